"""The real tokenizers: a text that spells a control token has none, all other text is as ever."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from awareness_vllm.models.tokens import load_tokenizer, tokenize

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", ["gemma3-270m", "smollm2-135m"])
def test_control_tokens_are_spelt(models: dict[str, Path], name: str) -> None:
    folder = models[name]
    plain, loaded = Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(folder)
    plain.encode_special_tokens = True
    controls = {i for i, t in loaded.get_added_tokens_decoder().items() if t.special}
    text = "a <start_of_image> b [multimodal] <unused7><|im_start|>user\n</think> <eos>"
    tokens = tokenize(loaded, text)
    assert not controls & set(tokens.ids)
    assert loaded.decode(tokens.ids, skip_special_tokens=False) == text
    assert tokens.spans[0, 0] == 0
    assert tokens.spans[-1, 1] == len(text.encode())
    assert (tokens.spans[1:, 0] == tokens.spans[:-1, 1]).all()
    markup = "<table>\n\n\n\t\t<tr> <b>x</b> é 日本 [1] {x} <- |y| <bbox></bbox>"
    for usual in (markup, "Plain text.\n" * 9):
        assert tokenize(loaded, usual).ids == plain.encode(usual, add_special_tokens=False).ids
