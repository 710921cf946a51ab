"""Shapes of the Triton programs: one place for the launcher and for the ahead-of-time check, and no import of torch."""

from dataclasses import dataclass

TOPK_BLOCK = 2048
_BACKWARD_SPAN = (
    16384  # elements of a row per program: enough to amortise a program, few enough to fill the GPU at N = 1024
)


@dataclass(frozen=True, slots=True)
class Launch:
    """A program works in tiles of U·32·warps·VEC elements; see `triton_kernels`."""

    warps: int
    U: int
    VEC: int

    @property
    def block(self) -> int:
        return self.U * 32 * self.warps * self.VEC

    @property
    def span(self) -> int:
        """Elements of a row per program of a backward kernel: a multiple of the tile."""
        return max(1, _BACKWARD_SPAN // self.block) * self.block

    def tile(self) -> dict[str, int]:
        """The kernels' tile constants."""
        return {"U": self.U, "L": 32 * self.warps, "VEC": self.VEC}


def launch_config(backward: bool, itemsize: int) -> Launch:
    """16-byte loads for the wider of the two dtypes; per tensor and lane 16 elements in flight forward, 8 backward.

    Chosen by the registers that ptxas reports (`python -m distill.kernels.aot`): no spills, and many warps per SM.
    """
    return Launch(4, itemsize // 2 if backward else itemsize, 16 // itemsize)
