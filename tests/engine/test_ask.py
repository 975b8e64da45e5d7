"""`awareness ask` with the real pair: SmolLM2's memories, Gemma-3's answers, no server."""

from __future__ import annotations

from pathlib import Path

import pytest
from awareness_demo.facts import fact_cases
from harness import awareness, captured

from awareness_vllm.aligners.answer import OfflineTarget
from awareness_vllm.packages.file import verify
from awareness_vllm.passages import BUDGET

# The first test may wait for the fit.
pytestmark = [pytest.mark.engine, pytest.mark.beside, pytest.mark.timeout(3600)]

CASES = fact_cases(9, seed=7)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ask") / "store"


def test_what_the_map_has_lost_is_read_again(
    smollm2: Path, gemma3: Path, small_wmatrix: Path, store: Path
) -> None:
    target = OfflineTarget(gemma3, [small_wmatrix])  # the shipped one has lost little
    right = {(BUDGET, 0): 0, (0, BUDGET): 0, (0, 0): 0}
    for case in CASES:
        memory = captured(smollm2, case["context"], store)
        asked = target.use(verify(store / f"{memory}.safetensors"))
        for ways in right:
            quoted, reread = ways
            answer = asked.ask(
                case["question"], quoted=quoted, reread=reread, max_tokens=8, raw=True
            )
            right[ways] += answer.text.startswith(case["answer"].strip())
            assert answer.native_tokens < answer.memory_tokens / 2
    print(right)
    *read, alone = right.values()
    assert min(read) > alone
    assert min(read) >= len(CASES) / 2


def test_the_command_shows_what_it_read(
    smollm2: Path, gemma3: Path, wmatrix: Path, store: Path
) -> None:
    case = CASES[0]
    memory = captured(smollm2, case["context"], store)
    question = case["question"].strip().partition("\n")[0].removeprefix("Question: ")
    run = awareness(
        *("ask", memory, question, "--store", store, "--target", gemma3, "--wmatrix", wmatrix)
    )
    assert run.status == 0, run.stderr[-2000:]
    assert run.out["text"]
    assert "\n" not in run.out["text"]
    for passage in run.out["passages"]:
        assert passage["text"] == case["context"][passage["begin"] : passage["end"]]
    assert run.out["native_s"] > run.out["answer_s"] / 4


def test_a_chat_model_answers_in_its_template(smollm2: Path, store: Path) -> None:
    text = "The ferry to the island leaves at nine in the morning from the second pier. " * 2
    memory = captured(smollm2, text, store)
    run = awareness(
        "ask", memory, "When does the ferry leave?", "--store", store, "--target", smollm2
    )
    assert run.status == 0, run.stderr[-2000:]
    assert (run.out["basis"], run.out["passages"]) == ("exact", [])
    assert "nine" in run.out["text"].lower()
