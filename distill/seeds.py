"""Counter-based randomness: a number for a purpose follows from integers alone, never from generator state.

So a sample's random choices are the same on any world size, in any batch, and after any restart.
"""

MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """A 64-bit hash of integers (SplitMix64's finaliser, Steele et al. 2014, folded over the values)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & MASK)) * 0xBF58476D1CE4E5B9 & MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
        state ^= state >> 31
    return state
