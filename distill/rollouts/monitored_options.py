"""What can be chosen about monitored rollouts; the names and defaults are those of ``conf/method/motab.yaml``."""

from dataclasses import dataclass, field

from distill.config import in_range, one_of
from distill.errors import ConfigError
from distill.rollouts.boundary import VALUES


@dataclass(kw_only=True)
class MonitorOptions:
    """Defaults are the paper's (MOTAB, arXiv 2605.19433) where it names one.

    Raises ConfigError for a value that cannot work.
    """

    value: str = "geometric_mean"
    """What the teacher thinks of a step: see `distill.rollouts.boundary.step_values`."""
    epsilon: float = 0.2
    """ε0: larger is stricter, with more work for the teacher; the paper recommends 0.1 to 0.5."""
    theta: float = 1.0
    """How much the boundary yields where the teacher itself is undecided; 0: not at all; recommended 0.5 to 2."""
    top_k: int = 20
    """Tokens that count in the teacher's entropy; recommended 10 to 50."""
    delimiters: list[str] = field(default_factory=lambda: [".\n\n"])
    """Strings that end a step and stay in its text."""
    step_tokens: int = 8192
    """A step without delimiter ends here."""
    rewind: str = "drop"
    """Where the teacher takes over: ``drop`` (before the steepest drop of V, Eq. 9) or ``step`` (before the breach)."""
    max_breaches: int = 1
    """The last takeover writes to the end, those before it one step each (the student then goes on). 1: the paper. 0: no
    limit, and every takeover is one step."""
    keep_flawed: bool = True
    """Keep what the student wrote since t* in the text, with ``marker`` behind it (Eq. 11); false drops both."""
    mask_flawed: bool = False
    """Leave the kept flawed span out of the loss."""
    marker: str = "\n\nHowever,\n\n"
    """Put between the flawed span and the teacher's text; its beginning is left out where the text already ends with it."""
    suffix_floor: int = 0
    """The teacher may always write this many tokens, even if the trajectory's budget leaves fewer (released code: 256)."""

    def __post_init__(self) -> None:
        one_of("method.value", self.value, VALUES)
        one_of("method.rewind", self.rewind, ("drop", "step"))
        in_range("method.epsilon", self.epsilon, low=0.0)
        in_range("method.theta", self.theta, low=0.0)
        in_range("method.top_k", self.top_k, low=1)
        in_range("method.step_tokens", self.step_tokens, low=1)
        in_range("method.max_breaches", self.max_breaches, low=0)
        in_range("method.suffix_floor", self.suffix_floor, low=0)
        if not self.delimiters or not all(self.delimiters):
            raise ConfigError(f"method.delimiters={self.delimiters} must name at least one non-empty string")
        if self.mask_flawed and not self.keep_flawed:
            raise ConfigError(
                "method.mask_flawed=true has nothing to mask with method.keep_flawed=false; set one of them"
            )
