"""Two answers as the token inspector shows them, with texts that would harm a page."""

from moe_bias.analysis.inspection import InspectedAnswer, InspectedToken, Inspection

SCRIPT = "<script>document.title = 'read as HTML'</script>"
NASTY = "</script><img src=x onerror=alert(1)>\u2028&amp;"


def token(number: int, text: str, **changes) -> InspectedToken:
    values = {
        "entropy": 0.5,
        "adapted_entropy": 0.25,
        "base": [(text, 0.75), (NASTY, 0.125)],
        "adapted": [(" 9", 0.5), (text, 0.375)],
        "experts": [(number % 20, 0.875), (3, 0.125)],
        "weight": 0.625,
        "kl": 0.03125,
        "bias": 1.5,
        "flip": False,
    }
    return InspectedToken(text, number, **{**values, **changes})


def inspection_of(*answers: list[InspectedToken]) -> Inspection:
    names = ("base", "adapted")
    shown = [InspectedAnswer(name, True, tokens) for name, tokens in zip(names, answers, strict=False)]
    return Inspection("tiny", "my-adapter", f"What is {SCRIPT}?", 0.2, 2.0, shown)


SHARED = [token(7, "To"), token(8, " solve", entropy=2.5, flip=True, kl=0.71)]
BASE = [*SHARED, token(9, " this\n\n"), *(token(20 + number, f" word{number}") for number in range(30))]
ADAPTED = [*SHARED, token(10, SCRIPT, entropy=3.25, weight=0.9375, bias=4.5, kl=1.125), token(11, NASTY)]
