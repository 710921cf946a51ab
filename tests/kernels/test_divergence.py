"""The dense divergence, torch path, against the fp64 oracle; and what every path shares: arguments, masks, dtypes."""

import math

import pytest
import torch
from distill.kernels import KINDS, divergence
from distill.kernels.kinds import make_spec
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from .kernel_cases import IDS, REGIMES, logits, oracle, relative_error
from .kernel_cases import KINDS as CASES

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize(("kind", "kw"), CASES, ids=IDS)
def test_loss_gradient_and_statistics_match_the_oracle(kind, kw, regime):
    student, teacher = logits(regime, 5, 1003)
    student.requires_grad_()
    upstream, ids = torch.linspace(0.5, 2, 5), torch.arange(5) * 7
    out = divergence(student, teacher, kind, 1.5, stats=True, token_ids=ids, top_k=0, **kw)
    (out.loss * upstream).sum().backward()
    loss, stats, grad = oracle(student, teacher, kind, upstream, temperature=1.5, token_ids=ids, **kw)
    assert out.loss.dtype == torch.float32
    assert out.path == "torch"
    torch.testing.assert_close(out.loss.double(), loss, rtol=3e-5, atol=1e-8)
    # q near 1 is known to 6e-8 only, and multiplies log-ratios as large as the loss
    tolerance = (2e-4 if regime in ("close", "flat") else 5e-6) * grad.norm() + 2e-7 * (1 + loss.max())
    assert (student.grad - grad).norm() < tolerance
    for name, values in stats.items():
        torch.testing.assert_close(out.stats[name].double(), values, rtol=3e-5, atol=4e-6, msg=name)


@pytest.mark.parametrize(("kind", "kw"), CASES, ids=IDS)
def test_equal_inputs_give_exactly_zero(kind, kw):
    student, teacher = logits("far", 4, 777)
    student = teacher.clone().requires_grad_()
    out = divergence(student, teacher, kind, 0.7, **kw)
    out.loss.sum().backward()
    assert torch.equal(out.loss, torch.zeros(4))
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize(("kind", "kw"), CASES, ids=IDS)
def test_gradcheck(kind, kw):
    student, teacher = (x.double() for x in logits("far", 3, 11))
    options = {"student_softcap": 5.0, "teacher_softcap": 4.0, "student_scale": 0.7, "teacher_scale": 0.9, **kw}
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64, requires_grad=True)

    def loss(x, w):
        return divergence(x, teacher, kind, 1.7, w, **options).loss

    assert gradcheck(loss, (student.requires_grad_(), weights.detach()))
    out = loss(student, weights)
    out.sum().backward()
    plain = divergence(student, teacher, kind, 1.7, **options).loss
    torch.testing.assert_close(weights.grad[[0, 2]], plain.detach()[[0, 2]])


@pytest.mark.parametrize(
    ("limit", "kind", "kw"),
    [
        ("forward_kl", "jsd", {"beta": 0.0}),
        ("reverse_kl", "jsd", {"beta": 1.0}),
        ("forward_kl", "skew_kl", {"alpha": 0.0}),
        ("reverse_kl", "skew_reverse_kl", {"alpha": 0.0}),
        ("forward_kl", "alpha", {"alpha": 1.0}),
        ("reverse_kl", "alpha", {"alpha": 0.0}),
    ],
)
def test_end_points_mean_the_kls(limit, kind, kw):
    student, teacher = logits("far", 3, 50)
    assert torch.equal(divergence(student, teacher, kind, **kw).loss, divergence(student, teacher, limit).loss)


def test_near_the_end_points_the_limits_are_approached():
    student, teacher = (x.double() for x in logits("far", 3, 50))
    forward = divergence(student, teacher, "forward_kl").loss
    torch.testing.assert_close(divergence(student, teacher, "alpha", alpha=1 - 1e-7).loss, forward, rtol=1e-5, atol=0)
    torch.testing.assert_close(divergence(student, teacher, "jsd", beta=1e-9).loss / 1e-9, forward, rtol=1e-5, atol=0)


def test_one_id_no_tokens_and_excluded_ids():
    one = torch.randn(3, 1, requires_grad=True)
    out = divergence(one, torch.randn(3, 1), "jsd", stats=True)
    out.loss.sum().backward()
    assert torch.equal(out.loss, torch.zeros(3))
    assert torch.equal(one.grad, torch.zeros(3, 1))
    none = torch.randn(0, 7, requires_grad=True)
    out = divergence(none, torch.randn(0, 7), stats=True)
    out.loss.sum().backward()
    assert out.loss.shape == (0,)
    assert none.grad.shape == (0, 7)
    student, teacher = torch.zeros(1, 4), torch.zeros(1, 4)
    student[0, 0] = -torch.inf  # the teacher's mass there is infinitely far in forward KL, and nowhere else
    assert divergence(student, teacher, "forward_kl").loss.item() == math.inf
    expected = math.log(4 / 3)
    assert divergence(student, teacher, "reverse_kl").loss.item() == pytest.approx(expected, rel=1e-6)
    for kind, kw in CASES[2:]:
        assert math.isfinite(divergence(student, teacher, kind, **kw).loss.item())


@pytest.mark.parametrize("kind", KINDS)
def test_surplus_ids_have_no_probability_and_no_gradient(kind):
    student, teacher = logits("far", 4, 40)
    wide = torch.cat((student, torch.full((4, 8), 9.0)), 1).requires_grad_()
    out = divergence(wide, teacher, kind)
    out.loss.sum().backward()
    leaf = student.clone().requires_grad_()
    expected = divergence(leaf, teacher, kind)
    expected.loss.sum().backward()
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(wide.grad, torch.nn.functional.pad(leaf.grad, (0, 8)))
    both = divergence(wide, torch.nn.functional.pad(teacher, (0, 3), value=7.0), kind, vocab_size=40)
    assert torch.equal(both.loss, expected.loss)


@pytest.mark.parametrize("weights", [torch.tensor([1.0, 0.0, 0.25, 0.0]), torch.tensor([True, False, True, False])])
def test_tokens_of_weight_zero_are_never_read(weights):
    student, teacher = logits("far", 4, 33)
    full = divergence(student, teacher, "jsd", stats=True)
    student[1], teacher[3] = torch.nan, torch.inf
    student.requires_grad_()
    out = divergence(student, teacher, "jsd", weights=weights, stats=True)
    out.loss.sum().backward()
    kept = weights != 0
    torch.testing.assert_close(out.loss[kept], (full.loss * weights)[kept])
    assert torch.equal(out.loss[~kept], torch.zeros(2))
    assert torch.equal(student.grad[~kept], torch.zeros(2, 33))
    assert student.grad[kept].abs().sum() > 0
    for name, values in out.stats.items():
        torch.testing.assert_close(values[kept], full.stats[name][kept])
        assert torch.equal(values[~kept], torch.zeros(2))


def test_nan_logits_are_not_swallowed():
    student, teacher = logits("far", 2, 30)
    student[0, 3] = torch.nan
    for kind, kw in CASES:
        assert divergence(student, teacher, kind, **kw).loss.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_fp32(dtype):
    student, teacher = (x.to(dtype) for x in logits("close", 4, 500))
    student.requires_grad_()
    out = divergence(student, teacher, "reverse_kl")
    out.loss.sum().backward()
    loss, _, grad = oracle(student, teacher, "reverse_kl", torch.ones(4))
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-4, atol=0)
    assert student.grad.dtype == dtype
    assert relative_error(student.grad, grad) < (4e-3 if dtype == torch.bfloat16 else 1e-3)


def test_shifted_slices_are_read_in_place():
    student, teacher = (x.view(3, 6, 20) for x in logits("far", 18, 20))
    student.requires_grad_()
    out = divergence(student[:, :-1], teacher[:, 1:], "jsd", stats=True, weights=torch.rand(3, 5) > 0.3)
    out.loss.sum().backward()
    again = student.detach().clone().requires_grad_()
    weights = (out.loss != 0).reshape(-1)
    flat = divergence(again[:, :-1].reshape(-1, 20), teacher[:, 1:].reshape(-1, 20), "jsd", stats=True, weights=weights)
    flat.loss.sum().backward()
    assert out.loss.shape == (3, 5)
    assert torch.equal(out.loss.reshape(-1), flat.loss)
    assert torch.equal(student.grad, again.grad)
    assert torch.equal(out.stats["student_entropy"].reshape(-1), flat.stats["student_entropy"])


@pytest.mark.parametrize("v", [300, 1000, 1300])  # on CPU three ways to the same k largest
def test_topk_statistics(v):
    student, teacher = logits("far", 6, v)
    out = divergence(student, teacher, stats=True, top_k=20, token_ids=torch.tensor([0, 1, 2, 3, 4, -1]))
    _, stats, _ = oracle(
        student, teacher, "forward_kl", torch.ones(6), top_k=20, token_ids=torch.tensor([0, 1, 2, 3, 4, -1])
    )
    for name in ("topk_agreement", "student_topk_entropy", "teacher_topk_entropy", "student_logprob"):
        torch.testing.assert_close(out.stats[name].double(), stats[name], rtol=1e-5, atol=1e-6, msg=name)
    assert divergence(student[:, :5], teacher[:, :5], stats=True).stats["topk_agreement"].tolist() == [1.0] * 6
    assert not any(x.requires_grad for x in divergence(student.requires_grad_(), teacher, stats=True).stats.values())


def test_in_place_backward_writes_over_the_logits():
    student, teacher = logits("far", 4, 64)
    leaf = student.clone().requires_grad_()
    hidden = leaf * 1.0
    address = hidden.data_ptr()
    divergence(hidden, teacher, "jsd", inplace=True).loss.sum().backward()
    reference = student.clone().requires_grad_()
    divergence(reference, teacher, "jsd").loss.sum().backward()
    assert torch.equal(leaf.grad, reference.grad)
    assert hidden.data_ptr() == address
    assert torch.equal(hidden.detach(), reference.grad)


def test_temperature_squared():
    student, teacher = logits("far", 4, 64)
    plain = divergence(student, teacher, temperature=3.0).loss
    assert torch.equal(divergence(student, teacher, temperature=3.0, temperature_squared=True).loss, plain * 9)


def test_chunks_do_not_change_the_result(monkeypatch):
    student, teacher = logits("far", 9, 100)
    student.requires_grad_()
    whole = divergence(student, teacher, "skew_kl", stats=True)
    whole.loss.sum().backward()
    grad, student.grad = student.grad, None
    monkeypatch.setattr("distill.kernels.torch_path.chunk_elements", lambda device: 250)
    parts = divergence(student, teacher, "skew_kl", stats=True)
    parts.loss.sum().backward()
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad, grad, rtol=1e-5, atol=1e-9)


def test_compile_autocast_and_checkpointing_agree_with_eager():
    student, teacher = logits("far", 4, 64)

    def run(function):
        leaf = student.clone().requires_grad_()
        out = function(leaf)
        out.sum().backward()
        return out.detach(), leaf.grad

    def plain(x):
        return divergence(x * 1.0, teacher, "jsd", weights=torch.ones(4), stats=True).loss

    def under_autocast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(x)

    expected = run(plain)
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    for function in (compiled, under_autocast, lambda x: checkpoint(plain, x, use_reentrant=False)):
        loss, grad = run(function)
        assert torch.equal(loss, expected[0])
        assert torch.equal(grad, expected[1])


def test_errors_name_the_value_and_the_choices():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"'kl'.*forward_kl, reverse_kl"):
        divergence(x, x, "kl")
    with pytest.raises(ValueError, match=r"'gpu'.*auto, triton, torch"):
        divergence(x, x, path="gpu")
    with pytest.raises(ValueError, match=r"CUDA tensors, got device cpu"):
        divergence(x, x, path="triton")
    with pytest.raises(TypeError, match=r"torch.float64"):
        divergence(x.double(), x, path="triton")
    with pytest.raises(TypeError, match=r"torch.int64.*torch.bfloat16"):
        divergence(x.long(), x)
    with pytest.raises(ValueError, match=r"\(2, 4\) and \(3, 4\)"):
        divergence(x, torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"weights.*\(2,\).*\(3,\)"):
        divergence(x, x, weights=torch.ones(3))
    with pytest.raises(TypeError, match=r"token_ids must be integers, got torch.float32"):
        divergence(x, x, stats=True, token_ids=torch.zeros(2))
    with pytest.raises(ValueError, match="vocabulary is empty"):
        divergence(torch.zeros(2, 0), torch.zeros(2, 0))


@pytest.mark.parametrize(
    ("message", "kw"),
    [
        ("temperature", {"kind": "jsd", "temperature": 0.0}),
        ("beta", {"kind": "jsd", "beta": 1.5}),
        ("alpha of skew_kl", {"kind": "skew_kl", "alpha": 1.0}),
        ("alpha of the alpha-divergence", {"kind": "alpha", "alpha": -0.1}),
        ("student_softcap", {"kind": "tvd", "student_softcap": -1.0}),
        ("teacher_scale", {"kind": "tvd", "teacher_scale": math.nan}),
    ],
)
def test_parameters_out_of_range(message, kw):
    with pytest.raises(ValueError, match=message):
        make_spec(**kw)
