# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # ノートブックから bitbook へ / From the notebook to bitbook
#
# | 日本語 | English |
# |---|---|
# | 元のノートブックの実験（MLP のスカラー量子化、行のクラスタリングによるベクトル量子化、その融合）を一歩ずつ bitbook でたどります。各節で、元の補助関数と、それに代わる数行を並べ、同じ結果になることを確かめます。 | The experiment of the source notebook, scalar quantization of an MLP, vector quantization by clustering rows, and their fusion, step by step with bitbook. Each section puts an old helper beside the lines that replace it, and checks that they agree. |
# | 最後に小さな実験で二つの問いに答えます。(a) スカラー量子化とベクトル量子化のサイズと正解率のトレードオフは？ (b) セントロイドをスカラー量子化すると、さらに圧縮できるか？ | At the end a small study answers both questions. (a) What is the trade-off between size and accuracy of scalar and of vector quantization? (b) Does scalar-quantizing the centroids compress further? |
#
# | 元の補助関数 / old helper | bitbook |
# |---|---|
# | `train` | `run_epochs` |
# | `compute_accuracy` | `evaluate` |
# | `replace_linear_with_quantizedlinear` | `quantize_(model, Plan({"*.weight": Uniform(4)}, …))` |
# | `replace_linear_with_vqlinear` | `… Codebook(0.5, (1, -1))` |
# | `replace_linear_with_vsqlinear` | `… Codebook(0.5, (1, -1), centroids=Uniform(4))` |
# | `compute_model_size` | `save(…)`, which writes the file and counts it |

# %% [markdown]
# ## 0. 準備 / Setting up
#
# | 日本語 | English |
# |---|---|
# | bitbook がなければ入れます。このノートブックを含むクローンか、隣に置いた wheel（`pip wheel . --no-deps` で作れます）を優先し、どちらもなければパッケージ索引から入れます。 | Installs bitbook where it is missing: from the clone that this notebook is in, else from a wheel beside it (`pip wheel . --no-deps` makes one), else from the package index. |

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("bitbook") is None:
    here = Path.cwd()
    clone = next((folder for folder in (here, *here.parents) if (folder / "src" / "bitbook").is_dir()), None)
    wheel = next(here.glob("bitbook-*.whl"), None)
    what = f"{clone or wheel or 'bitbook'}[study]"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", what], check=True)

# %%
import copy
import os
import tempfile

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bitbook
from bitbook import Activation, Codebook, FitOptions, Plan, Training, Uniform, evaluate, quantize_, run_epochs
from bitbook.data import load_dataset
from bitbook.models import build_model

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## 1. データとモデル / Data and model
#
# | 日本語 | English |
# |---|---|
# | すぐ動くように、埋め込みの 8×8 の手書き数字を使います。`"mnist"` にすれば、元と同じ MNIST と 784-128-64-10 の MLP になります（自動でダウンロードし、ハッシュを確認します）。 | The embedded 8×8 digits, so that it runs at once. `"mnist"` is the source's MNIST and its MLP of 784-128-64-10 (downloaded where missing, and checked by hash). |

# %%
DATASET = "digits"

data = load_dataset(DATASET)
name = {"digits": "mlp-64-32-16-10", "mnist": "mlp-784-128-64-10"}[DATASET]
model = build_model(name, seed=0)
loader = DataLoader(TensorDataset(data.test_x, data.test_y), batch_size=64)
print(model)

# %% [markdown]
# ## 2. `train`, `compute_accuracy`
#
# | 日本語 | English |
# |---|---|
# | 元の関数。 | The old helpers. |


# %%
def train(model, loader, lr=0.1, epochs=5):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(epochs):
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


@torch.no_grad()
def compute_accuracy(model, loader):
    model.eval()
    correct = sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)
    return 100 * correct / len(loader.dataset)


# %% [markdown]
# | 日本語 | English |
# |---|---|
# | bitbook では、データは一つのテンソルのままで、バッチは行の番号です。順序は `generator` だけで決まるので、何度でも同じ結果になります。 | In bitbook the data stay one tensor, and batches are numbers of rows. The order follows from `generator` alone, so that a run can be repeated to the bit. |

# %%
order = torch.Generator().manual_seed(0)
losses = run_epochs(model, data.train_x, data.train_y, Training(epochs=15, lr=0.1, batch=32), generator=order)
print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}, {evaluate(model, data.test_x, data.test_y).accuracy:.2f} %")
assert abs(evaluate(model, data.test_x, data.test_y).accuracy - compute_accuracy(model, loader)) < 1e-3
model_float = copy.deepcopy(model)

# %% [markdown]
# ## 3. `replace_linear_with_quantizedlinear`
#
# | 日本語 | English |
# |---|---|
# | 元の関数：すべての `Linear` を、重みと入力を毎回量子化する層に置き換えます。勾配は STE（straight-through）です。 | The old helper: every `Linear` becomes a layer that quantizes weight and input in each forward, its gradient straight through. |


# %%
class Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bits):
        q = 2 ** (bits - 1) - 1
        scale = torch.clamp((x.max() - x.min()) / (2 * q), min=1e-8)
        ctx.save_for_backward(x, q * scale)
        return scale * torch.clamp(torch.round(x / scale), -q, q)

    @staticmethod
    def backward(ctx, grad):
        x, limit = ctx.saved_tensors
        return grad * (x.abs() <= limit), None


class QuantizedLinear(nn.Module):
    def __init__(self, linear, weight_bits, act_bits):
        super().__init__()
        self.weight_bits, self.act_bits = weight_bits, act_bits
        self.weight, self.bias = (
            nn.Parameter(linear.weight.detach().clone()),
            nn.Parameter(linear.bias.detach().clone()),
        )

    def forward(self, x):
        x = Quantize.apply(x, self.act_bits)
        return F.linear(x, Quantize.apply(self.weight, self.weight_bits), self.bias)


def replace_linear_with_quantizedlinear(model, weight_bits=4, act_bits=4):
    for child_name, child in model.named_children():
        if isinstance(child, nn.Linear):
            setattr(model, child_name, QuantizedLinear(child, weight_bits, act_bits))


# %% [markdown]
# | 日本語 | English |
# |---|---|
# | bitbook では *プラン*：名前のパターン → レシピ。層のクラスは変わりません。 | In bitbook it is a *plan*: patterns of names → recipes. Layers keep their classes. |

# %%
old, new = copy.deepcopy(model_float), copy.deepcopy(model_float)
replace_linear_with_quantizedlinear(old, weight_bits=4, act_bits=4)
quantize_(new, Plan({"*.weight": Uniform(4)}, inputs={"fc*": Activation(Uniform(4))}))

x, y = data.train_x[:64], data.train_y[:64]
torch.testing.assert_close(new(x), old(x), rtol=1e-4, atol=1e-5)  # the same outputs …
for network in (old, new):
    network.zero_grad()
    F.cross_entropy(network(x), y).backward()
latent = next(p for p in new.fc1.parameters() if p.dim() == 2)
torch.testing.assert_close(latent.grad, old.fc1.weight.grad, rtol=1e-3, atol=1e-5)  # … and gradients
assert isinstance(new.fc1, nn.Linear) and not isinstance(old.fc1, nn.Linear)

# %% [markdown]
# | 日本語 | English |
# |---|---|
# | 量子化したまま続けて学習し、ファイルに書き、新しいモデルに読み戻します。読み戻したモデルは、学習時に見えていたものとビット単位で同じです。 | Train on under the plan, write the file, read it back into a fresh model: what comes back is, bit for bit, what training saw. |

# %%
run_epochs(new, data.train_x, data.train_y, Training(epochs=3, lr=0.01, batch=32), generator=order)
scalar = bitbook.save(bitbook.freeze(new), folder / "scalar.safetensors")
fresh = bitbook.load(folder / "scalar.safetensors", build_model(name, seed=1))
trained = evaluate(new, data.test_x, data.test_y).accuracy
assert evaluate(fresh, data.test_x, data.test_y).accuracy == trained
print(f"4/4 bits: {trained:.2f} % in {scalar.total:,} bytes")

# %% [markdown]
# ## 4. `replace_linear_with_vqlinear`
#
# | 日本語 | English |
# |---|---|
# | 元の関数：重みの行を k-means でまとめ、割り当てを固定してセントロイドを学習します。 | The old helper: rows of the weight are clustered by k-means; assignments stay, centroids train. |


# %%
class VQLinear(nn.Module):
    def __init__(self, linear, percent, bits=None):
        super().__init__()
        rows = linear.weight.detach().numpy()
        clusters = KMeans(max(int(len(rows) * percent / 100), 1), n_init=10, random_state=0).fit(rows)
        self.centroids = nn.Parameter(torch.from_numpy(clusters.cluster_centers_).float())
        self.register_buffer("labels", torch.from_numpy(clusters.labels_).long())
        self.bias, self.bits, self.error = nn.Parameter(linear.bias.detach().clone()), bits, clusters.inertia_

    def forward(self, x):
        centroids = self.centroids if self.bits is None else Quantize.apply(self.centroids, self.bits)
        return F.linear(x, centroids[self.labels], self.bias)


def replace_linear_with_vqlinear(model, percent=50):
    for child_name, child in model.named_children():
        if isinstance(child, nn.Linear):
            setattr(model, child_name, VQLinear(child, percent))


# %% [markdown]
# | 日本語 | English |
# |---|---|
# | bitbook では別のレシピにするだけです。`(1, -1)` は「一行が一つの符号語」、`0.5` は行数の 50 %。出力層の 10 行をまとめるとクラスの区別が失われるので、`None`（そのまま）にするのが得策です。 | In bitbook it is another recipe. `(1, -1)` says that a row is a codeword, `0.5` half as many as there are rows. Clustering the ten rows of the output layer merges classes, so it had better stay dense: `None`. |

# %%
old, new = copy.deepcopy(model_float), copy.deepcopy(model_float)
replace_linear_with_vqlinear(old, percent=50)
ten = FitOptions(restarts=10)
quantize_(new, Plan({"*.weight": Codebook(0.5, (1, -1))}), options=ten, generator=torch.Generator().manual_seed(0))
for layer in ("fc1", "fc2", "fc3"):
    weight = getattr(model_float, layer).weight
    error = (getattr(new, layer).weight - weight).square().sum().item()
    assert len(getattr(new, layer).weight.unique(dim=0)) == len(getattr(old, layer).centroids)
    print(f"{layer}: squared error {error:.3f}, of the old helper {getattr(old, layer).error:.3f}")

# %%
dense = {"fc3.weight": None}  # the output layer stays as it is
new = copy.deepcopy(model_float)
quantize_(new, Plan({**dense, "*.weight": Codebook(0.5, (1, -1))}), generator=torch.Generator().manual_seed(0))
run_epochs(new, data.train_x, data.train_y, Training(epochs=3, lr=0.01, batch=32), generator=order)
rows = bitbook.save(bitbook.freeze(new), folder / "rows.safetensors")
print(f"rows 50 %: {evaluate(new, data.test_x, data.test_y).accuracy:.2f} % in {rows.total:,} bytes")

# %% [markdown]
# ## 5. `replace_linear_with_vsqlinear`
#
# | 日本語 | English |
# |---|---|
# | 後の版の関数：セントロイドもスカラー量子化します（融合）。 | The helper of the later revision: centroids are scalar-quantized, too (fusion). |


# %%
def replace_linear_with_vsqlinear(model, percent=50, bits=4):
    for child_name, child in model.named_children():
        if isinstance(child, nn.Linear):
            setattr(model, child_name, VQLinear(child, percent, bits))


# %% [markdown]
# | 日本語 | English |
# |---|---|
# | bitbook では入れ子です：セントロイドを何で保存するかを書くだけ。丸めは k-means の中で行われます。 | In bitbook it is nesting: the recipe says how centroids are themselves stored. They are rounded inside k-means. |

# %%
new = copy.deepcopy(model_float)
fused_recipe = Codebook(0.5, (1, -1), centroids=Uniform(4))
quantize_(new, Plan({**dense, "*.weight": fused_recipe}), generator=torch.Generator().manual_seed(0))
assert len(new.fc1.weight.unique()) <= 15  # seven levels on each side, and zero
run_epochs(new, data.train_x, data.train_y, Training(epochs=3, lr=0.01, batch=32), generator=order)
fused = bitbook.save(bitbook.freeze(new), folder / "fused.safetensors")
print(f"rows 50 %, 4-bit centroids: {evaluate(new, data.test_x, data.test_y).accuracy:.2f} % in {fused.total:,} bytes")
assert fused.total < rows.total

# %% [markdown]
# ## 6. `compute_model_size`
#
# | 日本語 | English |
# |---|---|
# | 元の関数は、重みのビット数を数えます。割り当て（インデックス）、スケール、ヘッダーは数えません。 | The old helper counts bits of weights or centroids; no assignments, scales or header. |


# %%
def compute_model_size(model):
    bits = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            bits += module.weight.numel() * module.weight_bits + module.bias.numel() * 32
        elif isinstance(module, VQLinear):
            bits += module.centroids.numel() * (module.bits or 32) + module.bias.numel() * 32
        elif isinstance(module, nn.Linear):
            bits += module.weight.numel() * 32 + module.bias.numel() * 32
    return bits // 8


# %% [markdown]
# | 日本語 | English |
# |---|---|
# | bitbook では、書いたファイルの長さがサイズです。*台帳*（ledger）が 1 バイトごとの用途を示し、合計は必ずファイルの長さに一致します。 | In bitbook the size is the length of the file that was written. Its *ledger* says what each byte is for, and adds up to that length. |

# %%
old = copy.deepcopy(model_float)
replace_linear_with_vsqlinear(old, percent=50, bits=4)
print(f"counted by the old helper, output layer included: {compute_model_size(old):,} bytes")
for part, size in bitbook.ledger(folder / "fused.safetensors").by_part().items():
    print(f"{part:24} {size:6,} bytes")
assert bitbook.ledger(folder / "fused.safetensors").total == os.path.getsize(folder / "fused.safetensors")

# %% [markdown]
# ## 7. 二つの問い / Both questions
#
# | 日本語 | English |
# |---|---|
# | 小さな実験：レシピ × 種（シード）。どの試行も、ファイルを書き、新しいモデルに読み戻し、*そのファイル*のバイト数と正解率を報告します。ここでは固定幅の符号で比べます（`bitbook study --dataset mnist` が同じことを MNIST の 140 レシピ、5 つの種で行います）。 | A small study, recipes × seeds. Each trial writes a file, reads it back into a fresh model, and reports the bytes and accuracy of *that*. Files are of fixed width here; `bitbook study --dataset mnist` does the same for 140 recipes and five seeds on MNIST. |

# %%
from bitbook.study.grid import (
    COLUMNS,
    DIGITS,
    MNIST,
    ROWS,
    Layers,
    cluster_recipes,
    float_recipes,
    grid,
    scalar_recipes,
    vector_recipes,
)
from bitbook.study.trial import STARTS_FOLDER, run_trial

SEEDS = 3

layers = Layers()
recipes = [
    *float_recipes(("float32",)),
    *scalar_recipes(layers, (2, 3, 4, 6), (None,)),
    *cluster_recipes(layers, ROWS, (25, 50, 75), output=False),
    *cluster_recipes(layers, COLUMNS, (25, 50, 75), output=False),
    *cluster_recipes(layers, ROWS, (25, 50, 75), output=False, centroids=Uniform(4)),
    *vector_recipes(layers, 4, (16, 32, 64)),
    *vector_recipes(layers, 4, (16, 32, 64), centroids=Uniform(5)),
]
os.environ.setdefault(STARTS_FOLDER, str(folder / "starts"))  # float networks, trained once per seed
setting = {"digits": DIGITS, "mnist": MNIST}[DATASET]
cells = [cell for cell in grid(setting, recipes, range(SEEDS)) if "tune" in cell["phases"][0]]
results = [{"cell_id": str(i), "cell": cell, "result": run_trial(cell)} for i, cell in enumerate(cells)]
print(f"{len(results)} trials")

# %%
from bitbook.study.tables import grouped, points

(group,) = list(grouped(points(results)).values())[:1]
for point in sorted(group, key=lambda p: p.bytes):
    mark = "*" if point.front else " "  # no other is smaller and better, on validation
    scores = point.test.accuracy
    print(f"{mark} {point.bytes:8,.0f} bytes  {min(scores):6.2f} to {max(scores):6.2f} %  {point.recipe}")

# %% [markdown]
# | 日本語 | English |
# |---|---|
# | 等しい正解率で必要なバイト数を比べます（Bjøntegaard の方法、区間は種についてのブートストラップ）。種が少ないので区間は広く、区別できない場合はそう書きます。 | Bytes at equal accuracy (Bjøntegaard's way, intervals by bootstrap over seeds). Seeds are few, so intervals are wide, and what cannot be told apart is said to be so. |

# %%
from bitbook.study.priced.entropy import sentence
from bitbook.study.tables import equal_accuracy_savings

QUESTIONS = {
    "(a) スカラーとベクトル / scalar and vector quantization": [
        ("rows, output dense", "scalar"),
        ("columns, output dense", "scalar"),
        ("vectors of 4", "scalar"),
    ],
    "(b) セントロイドのスカラー量子化 / scalar-quantized centroids": [
        ("rows, output dense, 4-bit centroids", "rows, output dense"),
        ("vectors of 4, 5-bit centroids", "vectors of 4"),
        ("vectors of 4, 5-bit centroids", "scalar"),
    ],
}
for question, pairs in QUESTIONS.items():
    print(question)
    for found in equal_accuracy_savings(group, pairs):
        print("  -", sentence(found))

# %% [markdown]
# | 日本語 | English |
# |---|---|
# | MNIST での答え（区間つき）は [docs/results/mnist.md](../docs/results/mnist.md) にあります。ファイルをエントロピー符号化し、ビットに価格をつけて学習すると順位は変わります：[docs/start/choosing.md](../docs/start/choosing.md)。 | The answers for MNIST, with intervals: [docs/results/mnist.md](../docs/results/mnist.md). Entropy coding and a price on bits in training change the order: [docs/start/choosing.md](../docs/start/choosing.md). |
