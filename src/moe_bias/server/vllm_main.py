"""vLLM's own server, started by a module that imports nothing.

A process that it starts imports the module that was started, and the one that learns would import all of vLLM.
"""

if __name__ == "__main__":
    import runpy

    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
