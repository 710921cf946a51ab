"""The ahead-of-time check passes on a kernel, and fails where it must: spills, narrow loads. (`make check` runs all.)"""

import dataclasses
import subprocess
import sys

import pytest
from distill.kernels import aot

pytestmark = pytest.mark.unit

CHECK = """
import dataclasses, sys
from distill.kernels import aot
job = next(j for j in aot.jobs((90,)) if j.name == "forward_kl bf16 forward +stats")
constants, values = dict(job.constants), dict(job.values)
change = sys.argv[1]
if change == "spills":
    constants |= {"U": 16}
if change == "odd":
    values |= {"V": 50257, "s_stride_t": 50257, "t_stride_t": 50257}
report = aot.check(dataclasses.replace(job, constants=tuple(constants.items()), values=tuple(values.items())))
print(report.ok, report.local_bytes > 0, len(report.narrow) > 0)
"""


@pytest.mark.parametrize(
    ("change", "verdict"),
    [("none", "True False False"), ("spills", "False True False"), ("odd", "False False True")],
)
def test_verdicts(change, verdict):
    done = subprocess.run([sys.executable, "-c", CHECK, change], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == verdict


def test_every_kind_dtype_and_architecture_is_covered():
    jobs = list(aot.jobs(aot.ARCHITECTURES))
    names = {(job.name, job.arch) for job in jobs}
    assert len(names) == len(jobs)
    for arch in (80, 90, 100):
        for kind in ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "alpha", "tvd"):
            for dtype in ("bf16", "fp32"):
                assert (f"{kind} {dtype} backward", arch) in names
                assert (f"{kind} {dtype} forward +stats", arch) in names


def test_loop_accesses_are_found_in_loops_only():
    ptx = """
        ld.global.b16 %rs1, [%rd1];
    $L__BB0_2:
        @%p1 ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [ %rd2 + 0 ];
        st.global.b32 [%rd3], %r1;
        bar.sync 0;
        @%p2 bra $L__BB0_2;
        bra $L__BB0_9;
        ld.global.L1::evict_last.v2.b64 {%rd1, %rd2}, [%rd7];
    $L__BB0_9:
        ret;
    """
    assert [width for _, width in aot._loop_accesses(ptx)] == [16, 4]
    report = aot.Report(next(aot.jobs((90,))), 40, 0, 0, 2, (), 0)
    assert report.ok
    assert not dataclasses.replace(report, exchanges=1).ok
    assert not dataclasses.replace(report, local_bytes=8).ok
