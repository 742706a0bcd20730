"""Lets vLLM's second model runner start without a GPU: Triton interprets its kernels.

No wheel of Triton compiles for CPUs. vLLM takes it as usable there where it has a backend of that name. Python imports
this file when it starts, in each process that has its folder on PYTHONPATH.
"""

import os
from types import SimpleNamespace

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.backends import backends
    from triton.runtime.interpreter import InterpreterBuilder

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)

    def with_any_mask(original, place):
        """A compiler takes masks of integers too, which some of vLLM's kernels have."""

        def call(self, *args):
            args[place].data = args[place].data.astype(bool)
            return original(self, *args)

        return call

    for name, place in {"create_masked_load": 1, "create_masked_store": 2}.items():
        setattr(InterpreterBuilder, name, with_any_mask(getattr(InterpreterBuilder, name), place))
