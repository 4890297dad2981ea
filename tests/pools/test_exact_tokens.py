"""Exact counting: a real tokenizer trained here, and templates in the styles of common models."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from pools.adapters.tokenizer_files import load_tokenizer
from pools.exact_tokens import TemplateRefusal, TokenizerTokens

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
# writes a system message of its own where none is given, and trims
LLAMA = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|im_start|>system\n\nDate: {{ strftime_now('%d %b %Y') }}"
    "<|im_end|>{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
)
# numbers the messages, each longer than the one before
NUMBERED = "{% for m in messages %}<|im_start|>{{ 'word ' * loop.index }}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer_json():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|bos|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox user assistant system word words"] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.token_to_id("<|bos|>"))]
    )
    return tokenizer.to_str()


def counted_whole(tokens, messages):
    return len(tokens._tokenizer.encode(tokens.render(messages), add_special_tokens=False).ids)


texts = st.text(max_size=60)
messages = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), texts), min_size=1, max_size=6)


@pytest.mark.parametrize("template", [CHATML, LLAMA, NO_SYSTEM, NUMBERED])
def test_a_conversation_counts_as_its_rendering(tokenizer_json, template):
    tokens = TokenizerTokens(tokenizer_json, template, {"bos_token": "<|bos|>"})

    @given(messages)
    def same(conversation):
        assert tokens.of_chat(conversation) == counted_whole(tokens, conversation)

    same()


def test_a_system_message_counts(tokenizer_json):
    for template in (CHATML, LLAMA):
        tokens = TokenizerTokens(tokenizer_json, template, {"bos_token": "<|bos|>"})
        conversation = [("system", "be brief"), ("user", "the quick brown fox")]
        assert tokens.of_chat(conversation) == counted_whole(tokens, conversation)


def test_the_overhead_is_derived_where_messages_are_treated_alike(tokenizer_json):
    assert TokenizerTokens(tokenizer_json, CHATML).overhead is not None
    assert TokenizerTokens(tokenizer_json, NUMBERED).overhead is None
    assert "system" not in TokenizerTokens(tokenizer_json, NO_SYSTEM).overhead.message


def test_an_unknown_role_is_counted_whole(tokenizer_json):
    tokens = TokenizerTokens(tokenizer_json, CHATML)
    conversation = [("user", "hi"), ("tool", "the quick brown fox")]
    assert tokens.of_chat(conversation) == counted_whole(tokens, conversation)


def test_what_the_template_refuses_still_counts(tokenizer_json):
    tokens = TokenizerTokens(tokenizer_json, NO_SYSTEM)
    with pytest.raises(TemplateRefusal):
        tokens.render([("system", "x")])
    assert tokens.of_chat([("system", "the quick")]) > 0


def test_a_plain_prompt_has_its_bos(tokenizer_json):
    tokens = TokenizerTokens(tokenizer_json)
    assert tokens.of_text("") == 1
    assert tokens.of_text("word") == tokens.of_chat([("user", "word")]) + 1


def test_truncation_and_padding_of_the_file_do_not_count(tokenizer_json):
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    assert TokenizerTokens(tokenizer.to_str()).of_text("x" * 30) == 31


def test_a_template_cannot_reach_out(tokenizer_json):
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(TemplateRefusal):
        TokenizerTokens(tokenizer_json, escape).render([("user", "x")])


def test_from_files(tmp_path, tokenizer_json):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_json)
    assert load_tokenizer(path).overhead is None
    config = {"chat_template": CHATML, "bos_token": {"content": "<|bos|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    chatml = load_tokenizer(path).of_chat([("user", "hi")])
    (tmp_path / "chat_template.jinja").write_text(LLAMA)
    beside = load_tokenizer(path).of_chat([("user", "hi")])
    assert beside > chatml
    (tmp_path / "named.jinja").write_text(CHATML)
    assert load_tokenizer(path, tmp_path / "named.jinja").of_chat([("user", "hi")]) == chatml


def test_errors_name_the_file(tmp_path, tokenizer_json):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a Hugging Face tokenizer"):
        load_tokenizer(path)
    path.write_text(tokenizer_json)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: not a chat template"):
        load_tokenizer(path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not JSON"):
        load_tokenizer(path)
