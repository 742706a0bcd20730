"""Counting the calls of a function."""


def counted(monkeypatch, module, name):
    """Counts the calls of a function, by the first argument where it is a name."""
    real, calls = getattr(module, name), []

    def counting(*arguments, **keywords):
        calls.append(arguments[0])
        return real(*arguments, **keywords)

    monkeypatch.setattr(module, name, counting)
    return calls
