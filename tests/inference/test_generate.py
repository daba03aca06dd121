"""Completions of a model that recites a text: stop strings, end of text, streaming, prompts from files, chat."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.cli import main
from jaxtrain.data.chat import ChatTemplate
from jaxtrain.data.tokenizer import ByteTokenizer
from jaxtrain.inference.generate import complete, read_prompts
from jaxtrain.models.decode import Sampling

TEXT = "Grüße, 世界 🙂!\nUser: stop. END of it"


class Recite:
    """Model that writes one text, byte by byte, and then the end-of-text token."""

    vocab_size, max_seq_len = 300, 128

    def decode(self, params, tokens, cache, num_cached):
        text = jnp.asarray(np.append(ByteTokenizer().encode(TEXT), [256] * 100), jnp.int32)
        positions = num_cached + jnp.arange(tokens.shape[1])
        return jax.nn.one_hot(text[positions][None], 300) * 50.0, jnp.int32(0)


RECITE = Recite()


def run(prompts=("",), num_tokens=100, **options):
    options.setdefault("sampling", Sampling(0))
    return list(complete(RECITE, {}, ByteTokenizer(), list(prompts), num_tokens, **options))


@pytest.mark.parametrize(
    ("stop", "text", "finish"),
    [
        ((), TEXT, "end"),
        (("\nUser:",), "Grüße, 世界 🙂!", "stop"),
        (("界 🙂",), "Grüße, 世", "stop"),
        (("END", "stop", "nowhere"), "Grüße, 世界 🙂!\nUser: ", "stop"),
        (("it",), TEXT.removesuffix("it"), "stop"),
        (("G",), "", "stop"),
        (("nowhere",), TEXT, "end"),
    ],
)
def test_a_text_ends_before_the_first_stop_string(stop, text, finish):
    shown = []
    (found,) = run(stop=stop)
    assert (found.text, found.finish) == (text, finish)
    (streamed,) = run(stop=stop, on_text=lambda row, text: shown.append(text))
    assert "".join(shown) == streamed.text == text
    assert all("\ufffd" not in part for part in shown)


def test_a_text_may_end_in_the_middle():
    (found,) = run(num_tokens=4)  # G, r and both bytes of an umlaut
    assert (found.text, found.num_tokens, found.finish) == ("Grü", 4, "length")
    (past,) = run(num_tokens=60, stop_ids=())
    assert past.text.startswith(TEXT + "<|endoftext|>" * 2)
    with pytest.raises(ValueError, match="stop string is ''"):
        run(stop=("",))


def test_prompts_are_continued_in_order_in_batches_of_any_size():
    prompts = [TEXT[:n] for n in (0, 7, 20, 3, 11)]
    for batch_size in (1, 2, 8):
        assert [found.text for found in run(prompts, batch_size=batch_size)] == [TEXT[len(p) :] for p in prompts]


FILES = {
    "text": ("a\n\n  b \r\n", [{"prompt": "a"}, {"prompt": "  b "}]),
    "records": (
        '{"prompt": "a\\nb", "id": 7}\n\n{"messages": [{"role": "user", "content": "x"}]}\n',
        [{"prompt": "a\nb", "id": 7}, {"messages": [{"role": "user", "content": "x"}]}],
    ),
    "strings": ('"a\\n"\n"b"', [{"prompt": "a\n"}, {"prompt": "b"}]),
    "a text that looks like records": ('{"a": 1}\n3', [{"prompt": '{"a": 1}'}, {"prompt": "3"}]),
}
BAD_FILES = {
    "absent": (None, "no file"),
    "empty": (b"\n \n", "holds no prompt"),
    "not text": (b"\xff\xfe", "is not UTF-8"),
    "a line that differs": (b'{"prompt": "a"}\nb\n', "line 2 is not"),
    "a wrong type": (b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2 is not"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_prompts(name, tmp_path):
    text, records = FILES[name]
    (tmp_path / "prompts").write_text(text, newline="")
    assert read_prompts(str(tmp_path / "prompts")) == records


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_of_prompts(name, tmp_path):
    data, message = BAD_FILES[name]
    if data is not None:
        (tmp_path / "prompts").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / "prompts"))


CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}<|im_start|>assistant\n{% endif %}"
)


def test_a_chat_template_renders_messages_in_a_sandbox():
    template = ChatTemplate(CHATML, {"bos_token": "<s>"})
    user = [{"role": "user", "content": " 1 + 2? "}]
    assert template.render(user) == "<|im_start|>user\n1 + 2?<|im_end|>\n"
    assert template.render(user, add_generation_prompt=True).endswith("<s><|im_start|>assistant\n")
    for source, messages, message in (
        (CHATML, [{"role": "tool", "content": ""}], "no tools"),
        (CHATML, ["hello"], "a message is 'hello'"),
        ("{{ messages.__class__.__mro__ }}", user, "SecurityError"),
        ("{% for", user, "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", user, "ZeroDivisionError"),
        ("{{ messages[0]['content'] + 1 }}", user, "TypeError"),
    ):
        with pytest.raises(ValueError, match=message):
            ChatTemplate(source, {}).render(messages)


def test_the_command_continues_files_of_prompts_and_chats(run_dir, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1 + 2", "id": 7}\n{"prompt": "3"}\n{"prompt": "3"}\n')
    base = ["generate", str(run_dir), "--num-tokens", "6", "--seed", "3", "--past-end"]
    assert main([*base, "--prompts", str(prompts), "--json"]) == 0
    captured = capsys.readouterr()
    records = [json.loads(line) for line in captured.out.splitlines()]
    assert records[0].items() >= {"id": 7, "prompt": "1 + 2", "tokens": 6, "finish": "length"}.items()
    assert records[1]["text"] != records[2]["text"]  # a copy of a prompt is another sample
    assert "prefill: 10 tokens" in captured.err  # with an end-of-text token each
    assert "decode: 18 tokens" in captured.err
    assert main([*base, "--prompt", "3"]) == 0
    assert capsys.readouterr().out == f"3{records[1]['text']}\n"  # alone as in its batch
    assert main([*base, "--prompt", "3", "--stream"]) == 0
    assert capsys.readouterr().out == f"3{records[1]['text']}\n"
    assert main([*base, "--prompt", "3", "--chat"]) == 2
    assert "no chat template: put chat_template.jinja" in capsys.readouterr().err
    prompts.write_text('{"messages": [{"role": "user", "content": "3"}]}\n')
    assert main([*base, "--prompts", str(prompts)]) == 2
    assert "give --chat" in capsys.readouterr().err
    try:
        (run_dir / "chat_template.jinja").write_text("{{ messages[0].content }}")
        assert main([*base, "--prompts", str(prompts), "--chat"]) == 0
        chat = capsys.readouterr().out
        assert main([*base, "--prompt", "3", "--chat"]) == 0
        assert capsys.readouterr().out == chat
    finally:
        (run_dir / "chat_template.jinja").unlink()
    for flags, message in (
        (["--json", "--stream"], "leave out one"),
        (["--prompts", str(prompts), "--prompt", "x"], "leave out one"),
    ):
        assert main([*base, *flags]) == 2
        assert message in capsys.readouterr().err
