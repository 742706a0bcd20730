"""MoE-Bias: adapt a frozen language model at its output with routed, entropy-gated logit biases.

The public names are resolved on first use, so that `import moe_bias` costs nothing until then. One
import has an effect of its own: PEFT must know the method before it loads an adapter, so importing
this package after PEFT, or PEFT after it, registers the method.
"""
