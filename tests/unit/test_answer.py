"""`awareness ask`: a memory, a question, an answer, without a server; on random models."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from awareness_vllm.align.realign import AlignedMemory, copy
from awareness_vllm.aligners.answer import COMPLETION, OfflineMemory, OfflineTarget
from awareness_vllm.cli.main import main
from awareness_vllm.errors import AwarenessError, BadInput, ContextTooLong, NoWMatrix
from awareness_vllm.files import wmatrices_dir
from awareness_vllm.models.hf import states
from awareness_vllm.models.tokens import tokenize
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import Package, publish, without_text
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit

TEXT = "The quick brown fox jumps over the lazy dog. Other dogs look on. The lazy cat sleeps. " * 3
QUESTION = "What does the quick fox do?"
Models = tuple[Path, Path]


@pytest.fixture(scope="module")
def pair(fitted: WMatrix, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted map in a file."""
    path = tmp_path_factory.mktemp("maps") / "pair.wmatrix"
    fitted.to_int8().save(path)
    return path


@pytest.fixture(scope="module")
def package(tiny_models: Models) -> Package:
    return capture(tiny_models[0], TEXT)


@pytest.fixture(scope="module")
def target(tiny_models: Models, pair: Path) -> OfflineTarget:
    return OfflineTarget(tiny_models[1], [pair])


@pytest.fixture(scope="module")
def memory(target: OfflineTarget, package: Package) -> OfflineMemory:
    return target.use(package, "mem_x")


@pytest.fixture(scope="module")
def own(tiny_models: Models) -> OfflineTarget:
    """The source itself, without a chat template."""
    return OfflineTarget(tiny_models[0])


@pytest.fixture(scope="module")
def chat_target(tiny_models: Models, tmp_path_factory: pytest.TempPathFactory) -> OfflineTarget:
    """The source itself, with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_models[0], folder)
    template = "SYSTEM: be brief\n{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n"
    (folder / "chat_template.jinja").write_text(template + "{% endfor %}assistant:")
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return OfflineTarget(folder)


def greedy(target: OfflineTarget, ids: list[int], count: int) -> list[int]:
    """The model's own greedy continuation of ids, without a cache."""
    answer: list[int] = []
    for _ in range(count):
        with torch.inference_mode():
            logits = target.model(torch.tensor([[*ids, *answer]])).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


def test_an_answer_says_what_was_read_again(memory: OfflineMemory) -> None:
    pieces: list[str] = []
    answer = memory.ask(QUESTION, quoted=0, reread=40, max_tokens=5, raw=True, stream=pieces.append)
    assert "".join(pieces) == answer.text
    assert (answer.basis, answer.note) == ("aligned", "")
    assert answer.passages
    for passage in answer.passages:
        assert passage.text == TEXT[passage.begin : passage.end]
    assert any("quick" in passage.text for passage in answer.passages)
    read = sum(passage.tokens for passage in answer.passages)
    assert 8 <= read <= 40
    assert answer.native_tokens == read + answer.question_tokens
    assert min(answer.align_s, answer.answer_s, answer.native_s) > 0
    nothing = memory.ask(QUESTION, quoted=0, reread=0, max_tokens=5, raw=True)
    assert (nothing.passages, nothing.note) == ((), "none asked for")


def test_quotes_stand_between_the_memory_and_the_question(
    target: OfflineTarget, memory: OfflineMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[int]] = []

    def watched(ids: list[int], states: AlignedMemory) -> tuple[int, dict[str, Any]]:
        assert states.keys is memory.aligned.keys  # nothing is read again in place
        read.append(ids)
        return OfflineTarget.read(target, ids, states)

    monkeypatch.setattr(target, "read", watched)
    answer = memory.ask(QUESTION, quoted=40, max_tokens=3, raw=True)
    assert answer.passages
    assert all(passage.quoted for passage in answer.passages)
    quotes = " ".join(passage.text.strip() for passage in answer.passages)
    texts = (f"\n\nContext: {quotes}\n", QUESTION)
    expected = [id for text in texts for id in tokenize(target.tokenizer, text).ids]
    assert read == [expected]
    assert answer.native_tokens == answer.question_tokens == len(expected)


def test_a_text_to_go_on_with_has_no_quotes_nor_has_one_without_room(
    target: OfflineTarget, memory: OfflineMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = memory.ask("The quick fox", max_tokens=1, raw=True)
    assert plain.passages
    assert not any(passage.quoted for passage in plain.passages)
    asked = memory.ask(QUESTION, max_tokens=1, raw=True)
    used = asked.memory_tokens + asked.question_tokens
    for room, quoted in ((5, True), (4, False)):
        geometry = target.geometry.model_copy(update={"max_positions": used + room})
        monkeypatch.setattr(target, "geometry", geometry)
        passages = memory.ask(QUESTION, max_tokens=5, raw=True).passages
        assert passages
        assert {passage.quoted for passage in passages} == {quoted}


def test_tokens_go_on_from_the_cache_as_without_one(
    target: OfflineTarget, memory: OfflineMemory
) -> None:
    ids = memory.aligned.ids
    question = tokenize(target.tokenizer, QUESTION).ids
    native = AlignedMemory(ids, *states(target.model, ids))
    token, inputs = target.read(question, native)
    end = target.model.generation_config.eos_token_id
    expected = [*itertools.takewhile(lambda id: id != end, greedy(target, [*ids, *question], 6))]
    found = itertools.islice(target.continuation(token, inputs), 6)
    assert list(found) == expected


def test_a_memory_of_the_model_itself_is_a_copy(own: OfflineTarget, package: Package) -> None:
    memory = own.use(package)
    answer = memory.ask(QUESTION, max_tokens=3)
    assert (answer.basis, answer.passages) == ("exact", ())
    assert all(
        torch.equal(a, b) for a, b in zip(memory.aligned.keys, copy(package).keys, strict=True)
    )


def test_a_memory_stands_in_the_users_turn_of_a_chat(
    chat_target: OfflineTarget, package: Package
) -> None:
    memory = chat_target.use(package)
    prompt, _ = chat_target.prompt(QUESTION, raw=False)
    decode = chat_target.tokenizer.decode
    assert decode(prompt.head) == "SYSTEM: be brief\nuser: "
    assert decode(prompt.rest) == f"\n\n{QUESTION}\nassistant:"
    ids = [*prompt.head, *package.tokens]
    moved = memory.after_head(memory.aligned, prompt.head)
    assert moved.ids == ids
    # The first layer's states depend on token and position alone.
    expected = states(chat_target.model, ids)[0][0]
    torch.testing.assert_close(moved.keys[0].float(), expected.float(), atol=0.02, rtol=0.02)


def test_a_base_model_completes_one_line(own: OfflineTarget, package: Package) -> None:
    prompt, one_line = own.prompt(QUESTION, raw=False)
    assert one_line
    assert own.tokenizer.decode(prompt.rest) == COMPLETION.format(QUESTION)
    ids = tokenize(own.tokenizer, " one line\nand another").ids
    pieces: list[str] = []
    memory = own.use(package)
    assert memory.decoded(iter(ids), 99, True, pieces.append) == "one line"
    assert memory.decoded(iter(ids), 99, False, pieces.append) == "one line\nand another"
    assert "".join(pieces) == "one lineone line\nand another"


@pytest.mark.parametrize(
    ("question", "error"),
    [("", BadInput), (" \n", BadInput), ("a\udc80", BadInput), ("x " * 9000, ContextTooLong)],
)
def test_a_bad_question_is_refused(
    memory: OfflineMemory, question: str, error: type[AwarenessError]
) -> None:
    with pytest.raises(error):
        memory.ask(question)


def test_a_template_that_fails_is_named(chat_target: OfflineTarget, tmp_path: Path) -> None:
    shutil.copytree(chat_target.folder, tmp_path / "m")
    broken = OfflineTarget(tmp_path / "m")
    for template, says in (("{{ nothing.at.all }}", "rendered"), ("hello", "no place")):
        (tmp_path / "m" / "chat_template.jinja").write_text(template)
        with pytest.raises(AwarenessError, match=says):
            broken.prompt(QUESTION, raw=False)
        assert broken.prompt(QUESTION, raw=True)[0].head == []


def test_without_a_map_or_a_text(
    tiny_models: Models, target: OfflineTarget, package: Package
) -> None:
    with pytest.raises(NoWMatrix):
        OfflineTarget(tiny_models[1], []).use(package)
    with pytest.raises(NoWMatrix, match="without-text"):
        target.use(without_text(package))


@pytest.mark.slow
def test_the_command(
    tiny_models: Models,
    pair: Path,
    package: Package,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = publish(package, tmp_path)
    argv = ["ask", path.stem, QUESTION, "--target", str(tiny_models[1]), "--store", str(tmp_path)]
    assert main([*argv, "--wmatrix", str(pair), "--max-tokens", "4", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["memory"] == path.stem
    assert result["passages"][0]["text"]
    argv[1] = str(path)  # a file serves as well as an ID, and maps have their place at home
    wmatrices_dir().mkdir(parents=True, exist_ok=True)
    shutil.copy(pair, wmatrices_dir())
    assert main([*argv, "--quote", "0", "--reread", "0", "--max-tokens", "4"]) == 0
    assert "read      nothing of it natively: none asked for" in capfd.readouterr().out
    (wmatrices_dir() / pair.name).unlink()
    assert main([*argv, "--reread", "-1", "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["error"]["type"] == "BadInput"
