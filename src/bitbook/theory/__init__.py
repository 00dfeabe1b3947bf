"""What theory knows of quantizers: sources, Shannon's bound, high-rate constants, and where vectors gain."""
