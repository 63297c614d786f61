"""Conversations that are filled into a traced rendering, and texts that are tokenized in pieces, come out unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignkit.data.pieces import SEPARATOR, Pieces, of, plain_behind
from alignkit.data.rendering import ChatTemplate
from alignkit.data.special_tokens import SpecialToken, SpecialTokens

LOOP = "{% for m in messages %}%s{% endfor %}"
WRITES = {  # what a template may do with a text
    "plain": "{{ m.role }}: {{ m.content }};",
    "joined": "{{ '<' + m['content'] + '>' ~ m.content }}",
    "stripped": "[{{ m.content | trim }}|{{ m.content.rstrip('\\n') }}|{{ (m.content.lstrip() | trim).strip('.') }}]",
    "joined, then stripped": "{{ ('  ' + m.content) | trim }}{{ ('-' ~ m.content).strip() }}",
    "thoughts": "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}"
    "{% else %}none: {{ m.content }}{% endif %}",
    "starts": "{% if m.content.startswith('A') and not m.content.endswith('.') %}A{% endif %}{{ m.content }}",
    "empty": "{% if m.content %}{{ m.content }}{% else %}nothing{% endif %}",
    "equal": "{% if m.content == 'Hi' %}greeting{% elif 'Hi' == m.content %}?{% else %}{{ m.content }}{% endif %}",
    "in a list": "{{ 'short' if m.content in ['Hi', 'Ho'] else 'long' }}",
    "in a text": "{% set names = 'Hi, Ho' %}{{ 'known' if m.content in names else 'new' }}",
    "length": "{{ m.content | length }}{% if m.content | length > 4 %} long{% endif %}",
    "slice": "{{ m.content[:2] }}{{ m.content[-1:] }}",
    "letters": "{% for letter in m.content %}{{ letter }}.{% endfor %}",
    "json": "{{ m.content | tojson }}{{ m | tojson }}{{ messages[0] | tojson }}",
    "upper": "{{ m.content.upper() }}{{ m.content | upper }}{{ m.content.title() }}",
    "replaced": "{{ m.content.replace('i', 'y') }}{{ m.content | replace('i', 'y') }}",
    "put into": "{{ 'ixi' | replace('x', m.content) }}",
    "formatted": "{{ '%s!' % m.content }}{{ '%5s' | format(m.content) }}{{ '{:>6}'.format(m.content) }}",
    "macro": "{% macro text(t) %}{{ t }}{% endmacro %}{{ text(m.content) | trim }}{{ text(' ' + m.content) | trim }}",
    "block": "{% set kept %} {{ m.content }} {% endset %}{{ kept.strip() }}{{ kept | length }}",
    "filtered block": "{% filter trim %} {{ m.content }} {% endfilter %}",
    "namespace": "{% set ns = namespace(text='') %}{% set ns.text = ns.text + m.content %}{{ ns.text | trim }}",
    "dict": "{% set d = dict(m, role='x') %}{{ d.content }}{{ d }}",
    "safe": "{{ (m.content | safe).strip() }}",
    "list": "{{ [m.content, 'a'] | join(', ') }}{{ [m.content] | first }}",
    "selected": "{{ messages | selectattr('content', 'equalto', 'Hi') | list | length }}",
    "key": "{{ {'Hi': 1}[m.content] }}",
    "number": "{{ m.content | int }}{{ m.content * 2 }}",
    "past attributes": "{{ m.content.value }}{{ m.content.source }}{{ m.content._value }}",
    "roles": "{{ messages | map(attribute='role') | join }}{{ loop.last }}{{ messages[loop.index0 - 1].content }}",
    "refused": "{% if m.content == 'No' %}{{ raise_exception('no ' + m.content) }}{% endif %}{{ m.content }}",
}
TEXTS = ["Hi", "Ho", "  Hi.\n", "", " \n", "Alpha", "a</think>\n\nb", "No", "7", "\U00100000", "Ä é <b>"]
TEXTS += ["i</think>i</think>"]


@pytest.mark.parametrize("written", WRITES.values(), ids=WRITES)
def test_a_template_may_do_anything_with_a_text(written: str) -> None:
    template = ChatTemplate(LOOP.replace("%s", written), {"eos_token": "<eos>"}, "2026-11-25")

    def rendered(how: Any, *arguments: Any) -> str:
        try:
            return str(how(*arguments))
        except Exception as error:
            return f"refused: {error}"

    for _ in range(2):
        for one in TEXTS:
            for other in TEXTS:
                messages: Any = [{"role": "user", "content": one}, {"role": "assistant", "content": other}]
                assert rendered(template, messages, False) == rendered(template.render, messages, False)


def test_what_most_templates_do_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plain", "joined", "stripped", "thoughts", "starts", "empty", "equal", "in a list"):
        template = ChatTemplate(LOOP.replace("%s", WRITES[name]), {}, "2026-11-25")
        template([{"role": "user", "content": "Hi there."}], True)

        def never(*_: Any) -> str:
            raise AssertionError("rendered again")

        with monkeypatch.context() as patch:
            patch.setattr(template, "render", never)
            assert "there" in template([{"role": "user", "content": "He is there."}], True) or name == "in a list"


# --- tokenizing in pieces ---------------------------------------------------------------------------------------------

SPECIAL = ["<s>", "<|user|>", "<|end|>"]
MADE_UP = "<|user|>Hi there, two words<|end|>\n <|user|> <|end|><s>So it is.  <|user|>\n\nHi<|end|>"


def backend(kind: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE(unk_token="<s>"))
    if kind == "byte level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind == "prepends":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)  # type: ignore[arg-type]
        tokenizer.decoder = decoders.Metaspace()
    corpus = ["Hi there, two words. So it is, it is so. <|user|> and words"] * 9
    tokenizer.train_from_iterator(corpus, BpeTrainer(vocab_size=120, special_tokens=["<s>"], show_progress=False))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    return tokenizer


def of_backend(made: Any) -> Pieces | None:
    from transformers import PreTrainedTokenizerFast

    return of(PreTrainedTokenizerFast(tokenizer_object=made), MADE_UP)


@pytest.mark.parametrize("kind", ["byte level", "prepends", "first", "always", "never"])
def test_the_tokens_of_the_pieces_are_those_of_the_text(kind: str) -> None:
    made = backend(kind)
    pieces = of_backend(made)
    assert pieces is not None
    for start in range(len(MADE_UP)):
        for text in (MADE_UP[start:], MADE_UP[:start], MADE_UP[start:] + MADE_UP[:start]):
            assert pieces.ids(text) == made.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", ["byte level", "prepends", "first", "always", "never"])
def test_a_special_token_that_is_spelled_out_changes_no_other_token(kind: str) -> None:
    from transformers import PreTrainedTokenizerFast

    made = backend(kind)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    special = SpecialTokens({text: SpecialToken(made.token_to_id(text)) for text in SPECIAL})

    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    behind = plain_behind(tokenizer, plain)
    for start in range(len(MADE_UP)):
        text = MADE_UP[start:] + MADE_UP[:start]
        assert special.ids(text, plain, behind) == tokenizer(text, add_special_tokens=False)["input_ids"]
    spelled = special.ids(special.escape("<|user|>") + "<|end|>so", plain, behind)
    assert spelled == [*plain("<|user|>"), *tokenizer("<|end|>so", add_special_tokens=False)["input_ids"]]
    assert behind(f"so {SEPARATOR}") == plain(f"so {SEPARATOR}")


def test_tokens_that_take_what_is_beside_them_do_not_cut() -> None:
    from tokenizers import AddedToken

    text = "Hi <|mask|> there<|end|> it<|user|><|user|>> so"
    takes_right = backend("byte level")
    takes_right.add_special_tokens([AddedToken("<|mask|>", rstrip=True, normalized=False)])
    takes_right.add_tokens([AddedToken("it<|user", normalized=False), AddedToken("<|user|>>", normalized=False)])
    pieces = of_backend(takes_right)
    assert pieces is not None
    assert pieces.ids(text) == takes_right.encode(text, add_special_tokens=False).ids

    takes_left = backend("byte level")
    takes_left.add_special_tokens([AddedToken("<|mask|>", lstrip=True, normalized=False)])
    assert of_backend(takes_left) is None


def test_settings_that_others_leave_on_the_backend_do_no_harm() -> None:
    made = backend("byte level")
    pieces = of_backend(made)
    assert pieces is not None
    expected = made.encode(MADE_UP, add_special_tokens=False).ids
    made.enable_truncation(3)
    made.enable_padding(length=64)
    made.encode_special_tokens = True
    assert pieces.ids(MADE_UP) == expected


def test_check_counts_the_tokens_that_training_sees(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignkit import Demonstration
    from alignkit.data import encode, load_tokenizer
    from alignkit.data.chat_tokenizer import chat_tokenizer
    from alignkit.runs import row_checks

    tokenizer: Any = row_checks.Tokenizer.read(tokenizer_folder, None)
    assert chat_tokenizer(tokenizer).pieces is not None
    texts = ["Is it?", "It <eos> is.", "And é\n\nnow?", "<|im_start|>No."]
    row = Demonstration([{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)])
    trained = load_tokenizer(str(tokenizer_folder), None)
    for n in range(2):
        expected = [ids for ids, _ in encode(trained, row, [trained.eos_token_id])]
        assert row_checks._sequences(tokenizer, row) == expected, n
        monkeypatch.setattr(chat_tokenizer(trained), "pieces", None)
