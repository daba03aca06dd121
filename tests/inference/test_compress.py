"""Compression: the original comes back, a file is as large as the loss says, and what does not fit is refused."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtrain
from jaxtrain.cli import main
from jaxtrain.data.tokenizer import train_bpe
from jaxtrain.inference.bits import model_bits
from jaxtrain.inference.compress import StepModel, compress, decompress
from jaxtrain.inference.jxz import pack_file, unpack_file

TEXT = "".join(f"{a} + {b} = {a + b}\n" for a in range(9) for b in range(20, 30)).encode()
SHORT = TEXT[:300]


@pytest.fixture(scope="module")
def model(run_dir):
    return jaxtrain.load(run_dir)


def test_the_size_of_a_file_follows_from_the_loss(model):
    """Within 0.1 % and 64 bytes a stream: every token is coded with the probability that the loss gave it."""
    made = compress(model, TEXT, num_streams=1)
    header, payloads = unpack_file(made)
    assert [stream.num_tokens for stream in header.streams] == [len(TEXT)]
    assert len(payloads[0]) == pytest.approx(model_bits(model, TEXT) / 8, rel=1e-3, abs=8)
    assert len(made) - len(payloads[0]) < 256
    assert decompress(model, made) == TEXT


@pytest.mark.parametrize(
    "data",
    [b"", b"a", bytes(range(256)), np.random.default_rng(0).bytes(3000), TEXT, b"\xff" * 100, "日本 😀\0".encode() * 9],
    ids=["empty", "one byte", "all bytes", "random", "text", "no UTF-8", "unicode"],
)
def test_any_bytes_round_trip(model, data):
    progress = []
    made = compress(model, data, progress=lambda done, total: progress.append((done, total)))
    assert decompress(model, made) == data
    assert len(made) <= 1.01 * len(data) + 300
    assert progress == [(i + 1, len(progress)) for i in range(len(progress))]


def test_streams_take_turns(model):
    """The first token of a stream follows the last of the one before, as in the windows of an evaluation."""
    sizes = {}
    for number in (1, 5, 1000):
        made = compress(model, SHORT, num_streams=number)
        header, payloads = unpack_file(made)
        assert decompress(model, made) == SHORT
        sizes[number] = sum(map(len, payloads))
        assert len(payloads) == min(number, -(-len(SHORT) // header.window)) or number == 1000
    assert sizes[5] <= sizes[1] + 5 * 8
    with pytest.raises(ValueError, match="1 or more, got 0"):
        compress(model, SHORT, num_streams=0)


def test_another_tokenizer(model):
    """Its tokens are coded where they give the bytes back; other parts are stored."""
    bpe = dataclasses.replace(model, maybe_tokenizer=train_bpe([TEXT.decode()] * 3, 270))
    wide = dataclasses.replace(model.model, config=dataclasses.replace(model.model.config, vocab_size=270))
    bpe = dataclasses.replace(bpe, model=wide, params=jax.jit(wide.init)(jax.random.key(1)))
    data = TEXT[:300] + "größer 日本".encode() + b"\xff\xfe" + TEXT[:200]
    for number in (1, 4):
        made = compress(bpe, data, num_streams=number)
        assert decompress(bpe, made) == data
    assert any(stream.num_tokens for stream in unpack_file(made)[0].streams)
    with pytest.raises(ValueError, match="other parameters"):
        decompress(model, made)


def test_every_flipped_bit_is_noticed(model):
    made = compress(model, TEXT[:200])
    for index in range(len(made)):
        broken = bytearray(made)
        broken[index] ^= 1 << index % 8
        with pytest.raises(ValueError, match=r"jxz"):
            unpack_file(bytes(broken))
    for length in range(len(made)):
        with pytest.raises(ValueError, match=r"jxz"):
            unpack_file(made[:length])


def test_differences_from_the_encoder_are_refused_by_name(model, run_dir, monkeypatch):
    made = compress(model, SHORT)
    header, payloads = unpack_file(made)
    with pytest.raises(ValueError, match=r"other parameters .* give the run and --step"):
        decompress(jaxtrain.load(run_dir, 5), made)
    for field, value, message in (
        ("tokenizer", "0" * 32, "another tokenizer"),
        ("software", "jax 0.1 on tpu", "compressed with jax 0.1 on tpu, and this is jax .* install the same versions"),
        ("probe", "0" * 16, "a machine of the kind"),
        ("window", 10**6, "not in the model's context"),
        ("crc", 1, "decoded bytes are not the original"),
    ):
        with pytest.raises(ValueError, match=message):
            decompress(model, pack_file(dataclasses.replace(header, **{field: value}), payloads))
    for change in ({"num_bytes": 3}, {"streams": header.streams[:0]}):
        with pytest.raises(ValueError, match="malformed"):
            unpack_file(pack_file(dataclasses.replace(header, **change), payloads))


def test_a_leak_gives_a_low_loss_and_no_file(model):
    """A step that sees the token it predicts makes a tiny file, but the decoder has no such token."""

    class Leaking(StepModel):
        def __call__(self, token_R, index):
            probability_RV = super().__call__(token_R, index)
            return 1e-6 * probability_RV + np.eye(probability_RV.shape[-1])[SHORT[index]]

        def probe(self, num_streams):
            return StepModel(model, num_streams, self.window).probe(num_streams)

    made = compress(model, SHORT, num_streams=1, make_step=Leaking)
    assert sum(map(len, unpack_file(made)[1])) < 16 < sum(map(len, unpack_file(compress(model, SHORT))[1])) / 4
    with pytest.raises(ValueError, match="the decoded bytes are not the original"):
        decompress(model, made)


def test_a_leaking_model_is_found_out(model):
    """Attention to later tokens lowers the loss; the file, which is coded token by token, stays large."""

    class Leaking:
        vocab_size, max_seq_len = model.model.vocab_size, model.model.max_seq_len

        def loss(self, params, batch):
            sums = model.model.loss(params, batch)
            return dataclasses.replace(sums, nll=sums.nll * 0.1)

        decode = staticmethod(model.model.decode)

    leaking = dataclasses.replace(model, model=Leaking())
    assert 8 * len(compress(leaking, SHORT)) > 2 * model_bits(leaking, SHORT)


def test_models_that_cannot_compress(model, monkeypatch):
    class NoDecode:
        vocab_size = 257

    with pytest.raises(ValueError, match="NoDecode cannot compress without decode and max_seq_len"):
        compress(dataclasses.replace(model, model=NoDecode()), b"a")
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), model.params)
    with pytest.raises(ValueError, match="probabilities are not finite"):
        compress(dataclasses.replace(model, params=broken), b"a")
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxtrain\[compress\]'"):
        compress(model, b"a")


def test_the_commands(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(TEXT)
    assert main(["compress", str(run_dir), "a.txt", "-o", "b.jxz"]) == 0
    assert "kB/s" in capsys.readouterr().out
    assert main(["decompress", str(run_dir), "b.jxz"]) == 0
    assert (tmp_path / "b").read_bytes() == TEXT
    assert main(["bpb", str(run_dir), "a.txt", "b", "--json"]) == 0
    capsys.readouterr()
    assert main(["bpb", str(run_dir), "a.txt"]) == 0
    assert "xz" in capsys.readouterr().out
    (tmp_path / "empty").touch()
    for arguments, message in (
        (["compress", str(run_dir), "a.txt", "--out", "b.jxz"], "b.jxz exists"),
        (["compress", str(run_dir), "a.txt", "--out", "no/b.jxz"], "no folder no"),
        (["compress", str(run_dir), "/dev/zero", "--out", "b.jxz"], "/dev/zero is a device: give a file"),
        (["bpb", str(run_dir), "/dev/zero"], "/dev/zero is a device: give a file"),
        (["generate", str(run_dir), "--prompts", "/dev/zero"], "/dev/zero is a device: give a file"),
        (["compress", str(run_dir)], "FILE is missing: jaxtrain compress RUN FILE"),
        (["compress", str(run_dir), "nothing"], "nothing"),
        (["decompress", str(run_dir), "a.txt"], "does not end in .jxz"),
        (["decompress", str(run_dir), "a.txt", "-o", "c"], "a.txt: not a .jxz file"),
        (["decompress", str(run_dir), "b.jxz", "-o", "c", "--step", "5"], "b.jxz: compressed with other parameters"),
        (["bpb", str(run_dir), "empty"], "empty is empty"),
    ):
        assert main(arguments) in (1, 2)
        assert message in capsys.readouterr().err, arguments
