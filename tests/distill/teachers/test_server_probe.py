"""What is seen of a server before anything is trained: each way not to fit has a message that names the server and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config import TeacherSection
from distill.data import char_tokenizer
from distill.endpoints import Endpoint
from distill.errors import ConfigError, ServerError
from distill.teachers.server.probe import Need, NotNow, examine, recheck

placements = load(Path(__file__).with_name("placements.py"), "placements")
VllmStub = placements.VllmStub

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def folder(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("probe") / "teacher", 3)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def stub(model: Any, folder: Path) -> Iterator[Any]:
    with VllmStub(model, tokenizer=AutoTokenizer.from_pretrained(folder)) as server:
        yield server


@pytest.fixture
def need(folder: Path) -> Callable[..., Need]:
    values = {"vocabulary": 17, "exact": True, "context": 40, "kind": "topk", "top_k": 5}
    return lambda **changes: Need(AutoTokenizer.from_pretrained(folder), **(values | changes))


def asked(stub: Any, need: Need, **how: Any) -> Any:
    return examine(Endpoint(stub.url, request_s=10.0), need, **how)


def rows(answer: dict[str, Any]) -> list[Any]:
    return answer["choices"][0]["prompt_logprobs"]


def test_a_server_that_fits(stub: Any, need: Callable[..., Need]) -> None:
    facts = asked(stub, need())
    assert (facts.model, facts.context, facts.tempered) == ("stub", 1000, False)
    whole = stub.rows(need().probe())
    assert facts.fingerprint == pytest.approx([float(whole[p - 1][need().probe()[p]]) for p in range(1, 40)])
    assert asked(stub, need(kind="logits"), facts=facts).fingerprint == facts.fingerprint
    assert asked(stub, need(kind="sampled", exact=False, vocabulary=16)).model == "stub"
    stub.names = ["a", "b"]
    assert asked(stub, need(model="b")).model == "b"


def test_a_server_that_names_other_weights_is_told_of(stub: Any, need: Callable[..., Need], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/models/stub")
    assert [asked(stub, need(path=path)).doubt for path in (None, "/models/stub", str(tmp_path / "link"))] == [None] * 3
    doubt = asked(stub, need(path="runs/teacher/final")).doubt
    assert f"server at {stub.url}: it serves '/models/stub', and model.teacher.path is 'runs/teacher/final'" in doubt


def shifted(request: dict[str, Any], answer: dict[str, Any]) -> None:
    """It adds a token of its own in front."""
    rows(answer)[1:] = [rows(answer)[-1], *rows(answer)[1:-1]]


def truncated(request: dict[str, Any], answer: dict[str, Any]) -> None:
    del rows(answer)[30:]


def without(request: dict[str, Any], answer: dict[str, Any]) -> None:
    answer["choices"][0].pop("prompt_logprobs", None)


def infinite(value: float) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def spoil(request: dict[str, Any], answer: dict[str, Any]) -> None:
        for entry in rows(answer)[-1].values() if len(rows(answer)) > 1 else ():
            entry["logprob"] = value

    return spoil


def raw_logits(request: dict[str, Any], answer: dict[str, Any]) -> None:
    for row in rows(answer)[1:]:
        for entry in row.values():
            entry["logprob"] += 4.0


def fewer(request: dict[str, Any], answer: dict[str, Any]) -> None:
    """It cuts down what was asked for, and says nothing."""
    for row, token in zip(rows(answer)[1:], request["prompt"][1:], strict=True):
        for other in [key for key in row if key != str(token)][2:]:
            del row[other]


def spelled_otherwise(request: dict[str, Any], answer: dict[str, Any]) -> None:
    other = char_tokenizer("=-+#9876543210\n")
    for row in rows(answer)[1:]:
        for token, entry in row.items():
            entry["decoded_token"] = other.decode([int(token)])


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"top_k": 17}, {"max_logprobs": 16}, r"gives no 17 log-probabilities.*--max-logprobs=17 or more, or lower teacher\.top_k"),
        ({"kind": "logits"}, {"max_logprobs": 16}, r"gives no 17 log.*--max-logprobs=17 or more, or use teacher\.signal=topk"),
        ({}, {"context": 40}, r"a context of 40 tokens, and this run needs 41.*--max-model-len=41 .*train\.max_length=39"),
        ({"vocabulary": 18}, {}, r"a smaller vocabulary than the 18 tokens of model\.teacher\.path"),
        ({"vocabulary": 16}, {}, r"a larger vocabulary than the 16"),
        ({"vocabulary": 18, "exact": False}, {}, None),  # padding of the student's alone
        ({"model": "wanted"}, {}, r"serves stub, not 'wanted'; set teacher\.server\.model"),
        ({}, {"names": ["a", "b"]}, r"serves a, b; set teacher\.server\.model to one of them"),
        ({}, {"key": "k"}, r"refuses .*status 401.*set VLLM_API_KEY"),
        ({}, {"spoil": without}, r"it sent no prompt_logprobs"),
        ({}, {"spoil": shifted}, r"token \d+ of the text is \d+, and it spoke of"),
        ({}, {"spoil": truncated}, r"it spoke of 30 tokens and was sent 40"),
        ({"context": 200}, {"spoil": lambda r, a: rows(a).__delitem__(slice(100, None))}, r"a text of 200 tokens .*100 tokens"),
        ({}, {"spoil": infinite(float("nan"))}, r"a log-probability is nan"),
        ({}, {"spoil": infinite(float("-inf"))}, r"a log-probability is -inf"),
        ({}, {"spoil": infinite(-9999.0)}, r"a log-probability is -inf"),
        ({}, {"spoil": raw_logits}, r"--logprobs-mode=raw_logprobs"),
        ({}, {"spoil": fewer}, r"log-probabilities for a token, where 5 were asked for"),
        ({}, {"spoil": spelled_otherwise}, r"has another tokenizer: of \d+ tokens \d+ differ \(\d+ is '.'.* there and"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_its_remedy(
    stub: Any, need: Callable[..., Need], changes: dict[str, Any], settings: dict[str, Any], message: str | None
) -> None:
    for name, value in settings.items():
        setattr(stub, name, value)
    if message is None:
        asked(stub, need(**changes))
        return
    with pytest.raises(ServerError, match=message) as caught:
        asked(stub, need(**changes))
    assert stub.url in str(caught.value)


def test_a_temperature_that_counts_is_seen(stub: Any, need: Callable[..., Need]) -> None:
    def warm(request: dict[str, Any], answer: dict[str, Any]) -> None:
        for row in rows(answer)[1:] if request["temperature"] != 1.0 else ():
            for entry in row.values():
                entry["logprob"] /= request["temperature"]

    stub.spoil = warm
    assert asked(stub, need()).tempered


def test_another_model_is_not_taken_for_the_same(stub: Any, need: Callable[..., Need], model: Any) -> None:
    facts = asked(stub, need())
    endpoint = Endpoint(stub.url, request_s=10.0)
    recheck(endpoint, need(), facts)
    stub.model = AutoModelForCausalLM.from_config(model.config).eval()
    with pytest.raises(ServerError, match=r"answers with another model than this run began with: .* differ by \d"):
        recheck(endpoint, need(), facts)
    stub.down()
    with pytest.raises(NotNow, match="Connection"):
        recheck(endpoint, need(), facts)


def test_configurations_that_cannot_work(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.signal=hidden does not come from a server.*topk"):
        TeacherSection(placement="server", signal="hidden")
    with pytest.raises(ConfigError, match=r"set teacher\.server\.url="):
        placements.open_stub([], folder, "topk", 5)
    with pytest.raises(ConfigError, match="names a server twice"):
        placements.open_stub(["http://h:1", "http://h:1"], folder, "topk", 5)
    with pytest.raises(
        ServerError, match=r"no server of the teacher has answered for \d s .*http://127\.0\.0\.1:9.*correct teach"
    ):
        placements.open_stub(["http://127.0.0.1:9"], folder, "topk", 5, pause_s=0.1)


def test_a_run_goes_on_with_the_model_that_it_began_with(stub: Any, folder: Path, model: Any, tmp_path: Path) -> None:
    for _ in range(2):
        placements.open_stub([stub.url], folder, "topk", 5, run=tmp_path).close()
    stub.model = AutoModelForCausalLM.from_config(model.config).eval()
    with pytest.raises(ServerError, match=r"'stub' is not the teacher that this run began with.*another run\.dir"):
        placements.open_stub([stub.url], folder, "topk", 5, run=tmp_path)
    (tmp_path / "teacher_probe.json").write_text("[1]")
    with pytest.raises(ServerError, match=r"teacher_probe\.json does not tell which teacher"):
        placements.open_stub([stub.url], folder, "topk", 5, run=tmp_path)
