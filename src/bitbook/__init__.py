"""bitbook: small networks from bits (scalar quantization), codebooks (vector quantization), and their fusion."""

from bitbook.apply import Coverage as Coverage
from bitbook.apply import compress_by_plan as compress_by_plan
from bitbook.apply import dequantize_ as dequantize_
from bitbook.apply import freeze as freeze
from bitbook.apply import load as load
from bitbook.apply import quantize_ as quantize_
from bitbook.apply import quantize_dense as quantize_dense
from bitbook.artifact import Artifact as Artifact
from bitbook.artifact import Ledger as Ledger
from bitbook.artifact import read as read
from bitbook.artifact import read_ledger as read_ledger
from bitbook.artifact import save as save
from bitbook.budget.compress import compress as compress
from bitbook.budget.compress import fit_budget as fit_budget
from bitbook.budget.fit import Fit as Fit
from bitbook.budget.fit import FitSettings as FitSettings
from bitbook.budget.fit import Fitted as Fitted
from bitbook.budget.report import Report as Report
from bitbook.feedback import ErrorFeedback as ErrorFeedback
from bitbook.feedback import FeedbackOptions as FeedbackOptions
from bitbook.feedback import FeedbackReport as FeedbackReport
from bitbook.fisher import fisher_diagonal as fisher_diagonal
from bitbook.importance import row_energies as row_energies
from bitbook.importance import second_moments as second_moments
from bitbook.inputs import calibrate as calibrate
from bitbook.lattice.e8p import E8P as E8P
from bitbook.lattice.lattice import Lattice as Lattice
from bitbook.loop import Training as Training
from bitbook.loop import evaluate as evaluate
from bitbook.loop import run_epochs as run_epochs
from bitbook.outputs import Categorical as Categorical
from bitbook.outputs import Gaussian as Gaussian
from bitbook.plan import Activation as Activation
from bitbook.plan import Plan as Plan
from bitbook.qat import FakeQuantize as FakeQuantize
from bitbook.qat import Regime as Regime
from bitbook.quantizer import FitOptions as FitOptions
from bitbook.quantizer import Quantized as Quantized
from bitbook.quantizer import Quantizer as Quantizer
from bitbook.quantizer import quantize as quantize
from bitbook.rate.encoding import quantize_priced as quantize_priced
from bitbook.rate.finetuning import FineTuning as FineTuning
from bitbook.rate.finetuning import finetune as finetune
from bitbook.rate.pricing import Pricing as Pricing
from bitbook.rate.training import RateTraining as RateTraining
from bitbook.rate.training import Trained as Trained
from bitbook.rate.training import train as train
from bitbook.scalar.ecsq import ECSQ as ECSQ
from bitbook.scalar.leaves import Float as Float
from bitbook.scalar.leaves import Integer as Integer
from bitbook.scalar.levels import Binary as Binary
from bitbook.scalar.levels import Ternary as Ternary
from bitbook.scalar.lloyd_max import GAUSS as GAUSS
from bitbook.scalar.lloyd_max import LAPLACE as LAPLACE
from bitbook.scalar.lloyd_max import lloyd_max as lloyd_max
from bitbook.scalar.pruned import Pruned as Pruned
from bitbook.scalar.sign_magnitude import SignMagnitude as SignMagnitude
from bitbook.scalar.table import NF4 as NF4
from bitbook.scalar.table import PowersOfTwo as PowersOfTwo
from bitbook.scalar.table import Table as Table
from bitbook.scalar.uniform import Uniform as Uniform
from bitbook.transforms.balanced import Balanced as Balanced
from bitbook.transforms.permuted import Permuted as Permuted
from bitbook.transforms.rotated import Rotated as Rotated
from bitbook.transforms.row_scaled import RowScaled as RowScaled
from bitbook.trellis.tcq import TCQ as TCQ
from bitbook.trellis.trellis import Trellis as Trellis
from bitbook.vector.codebook import Codebook as Codebook
from bitbook.vector.gain_shape import GainShape as GainShape
from bitbook.vector.residual import Residual as Residual

ledger = read_ledger
"""`bitbook.ledger(path)`: what every byte of a file is for."""

__version__ = "0.1.0"
