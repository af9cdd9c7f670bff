"""The sentence encoder against sentence-transformers' formula computed by hand, and its cache."""

from __future__ import annotations

import json
import logging
import threading

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from priorzero.text.encoder import (
    SentenceEncoder,
    embedded_folder,
    read_pooling_rule,
    resolve_encoder,
)
from priorzero.types import PriorZeroError

TEXTS = [
    "You are standing in an open field west of a white house, with a boarded front door.",
    "take lamp",
    "",
    "Ouvre la fenêtre! 開ける",
    "It is pitch black. You are likely to be eaten by a grue. " * 6,
]


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    return load("auto")


def load(name, cache_bytes: int = 2**24) -> SentenceEncoder:
    return SentenceEncoder(str(name), device="cpu", cache_bytes=cache_bytes)


def by_hand(folder, text: str, pooling: str, normalize: bool, max_length: int) -> np.ndarray:
    """One text at a time, no padding, so no masking can go wrong; the formula of
    sentence-transformers.
    """
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModel.from_pretrained(folder).eval(),
    )
    with torch.no_grad():
        hidden = model(
            **tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length)
        )[0][0]
    vector = {"mean": hidden.mean(dim=0), "cls": hidden[0], "max": hidden.amax(dim=0)}[pooling]
    return (vector / vector.norm() if normalize else vector).numpy()


def test_embedded_model_equals_mean_pooling_and_normalisation_by_hand(encoder):
    expected = np.stack([by_hand(embedded_folder(), text, "mean", True, 256) for text in TEXTS])
    got = encoder.encode(TEXTS)
    assert got.dtype == np.float32 and got.shape == (len(TEXTS), 384) == (len(TEXTS), encoder.dim)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)


def test_a_paraphrase_is_closer_than_another_subject(encoder):
    for text, paraphrase, other in [
        ("open the wooden door", "The door made of wood is opened.", "eat the garlic sandwich"),
        (
            "You are in a dark cave.",
            "It is pitch black in this cavern.",
            "The detective questions the mayor.",
        ),
        ("go north", "walk to the north", "light the lamp"),
    ]:
        a, b, c = encoder.encode([text, paraphrase, other])
        assert a @ b > a @ c + 0.2


def tiny_model(
    folder, pooling: dict | None, modules=("Transformer", "Pooling"), max_seq_length=None
):
    """A random BERT with the real tokenizer, saved the way sentence-transformers saves one."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    tokenizer.save_pretrained(folder)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
        )
    ).save_pretrained(folder)
    if pooling is not None:
        paths = {
            "Transformer": "",
            "Pooling": "1_Pooling",
            "Normalize": "2_Normalize",
            "Dense": "2_Dense",
        }
        listing = [
            {
                "idx": i,
                "name": str(i),
                "path": paths[m],
                "type": f"sentence_transformers.models.{m}",
            }
            for i, m in enumerate(modules)
        ]
        (folder / "modules.json").write_text(json.dumps(listing))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if max_seq_length:
        (folder / "sentence_bert_config.json").write_text(
            json.dumps({"max_seq_length": max_seq_length})
        )
    return folder


@pytest.mark.parametrize(
    ("pooling", "modules", "mode", "normalize"),
    [
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
            ("Transformer", "Pooling", "Normalize"),
            "cls",
            True,
        ),
        (
            {"pooling_mode": "max", "word_embedding_dimension": 16},
            ("Transformer", "Pooling"),
            "max",
            False,
        ),
        ({"pooling_mode_mean_tokens": True}, ("Transformer", "Pooling"), "mean", False),
    ],
)
def test_the_models_own_pooling_rule_is_used(tmp_path, pooling, modules, mode, normalize):
    folder = tiny_model(tmp_path, pooling, modules, max_seq_length=20)
    got = load(folder).encode(TEXTS)
    expected = np.stack([by_hand(folder, text, mode, normalize, 20) for text in TEXTS])
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_model_without_a_rule_is_mean_pooled_with_a_warning_and_other_modules_are_refused(
    tmp_path, caplog
):
    (tmp_path / "plain").mkdir()
    (tmp_path / "dense").mkdir()
    plain = tiny_model(tmp_path / "plain", None)
    with caplog.at_level(logging.WARNING, logger="priorzero"):
        rule = read_pooling_rule(plain, 512, 64)
    assert (rule.mode, rule.normalize, rule.max_tokens) == (
        "mean",
        True,
        64,
    ) and "modules.json" in caplog.text
    dense = tiny_model(
        tmp_path / "dense", {"pooling_mode_mean_tokens": True}, ("Transformer", "Pooling", "Dense")
    )
    with pytest.raises(PriorZeroError, match="Dense"):
        read_pooling_rule(dense, 512, 64)


def test_long_texts_lose_their_end_and_are_counted(tmp_path):
    encoder = load(tiny_model(tmp_path, {"pooling_mode_mean_tokens": True}, max_seq_length=8))
    whole, long, longer = encoder.encode(
        ["a b c d e f", "a b c d e f g", "a b c d e f something else"]
    )
    # 8 tokens are [CLS], six words, [SEP].
    np.testing.assert_allclose(long, whole, atol=1e-6)
    np.testing.assert_allclose(longer, whole, atol=1e-6)
    assert encoder.stats()["truncated"] == 2


@pytest.fixture
def tiny(tmp_path) -> str:
    return str(tiny_model(tmp_path, {"pooling_mode_mean_tokens": True}))


def test_each_distinct_text_is_computed_once(tiny):
    encoder = load(tiny)
    first = encoder.encode(["a", "b", "a"])
    again = encoder.encode(["b", "a"])
    np.testing.assert_array_equal(again, first[[1, 0]])
    np.testing.assert_array_equal(first[0], first[2])
    stats = encoder.stats()
    assert (stats["misses"], stats["hits"], stats["cache_entries"]) == (2, 3, 2) and stats[
        "seconds"
    ] > 0
    assert encoder.encode([]).shape == (0, 16)
    with pytest.raises(AssertionError):
        encoder.encode("a")


def test_the_cache_stays_in_its_bytes_and_forgets_the_least_recently_used(tiny):
    probe = load(tiny)
    probe.encode(["a"])
    encoder = load(tiny, cache_bytes=2 * probe.stats()["cache_bytes"])
    encoder.encode(["a", "b"])
    encoder.encode(["a"])
    encoder.encode(["c"])  # b leaves
    misses = encoder.stats()["misses"]
    encoder.encode(["a", "c"])
    assert encoder.stats()["misses"] == misses
    encoder.encode(["b"])
    assert encoder.stats()["misses"] == misses + 1
    assert encoder.stats()["cache_bytes"] <= 2 * probe.stats()["cache_bytes"]
    many = [f"text {i}" for i in range(50)]
    np.testing.assert_allclose(encoder.encode(many), probe.encode(many), atol=1e-6)


def test_threads_share_the_work(tiny):
    encoder = load(tiny)
    texts = [f"room {i}" for i in range(60)]
    results: list[np.ndarray | None] = [None] * 4

    def work(k: int) -> None:
        results[k] = encoder.encode(texts)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(results[0], other) for other in results[1:])
    assert encoder.stats()["misses"] == 60 and encoder.stats()["hits"] == 180


def test_the_choice_is_logged_and_a_missing_model_names_the_way_out(tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, logger="priorzero"):
        assert resolve_encoder("auto").folder == embedded_folder()
    assert "all-MiniLM-L6-v2" in caplog.text and "auto" in caplog.text
    with pytest.raises(PriorZeroError, match="config.json"):
        resolve_encoder(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PriorZeroError, match="auto"):
        resolve_encoder("nobody/no-such-encoder")
    with pytest.raises(PriorZeroError, match="auto"):
        resolve_encoder("not a/valid/name")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PriorZeroError, match="pip install"):
        resolve_encoder("auto")


def test_a_saved_cache_gives_the_same_bits_and_leaves_in_the_same_order():
    """In another batch a text's vector differs in its last bits, so a resumed run needs the old."""
    one, two = load("auto"), load("auto")
    one.encode(TEXTS)
    one.encode(TEXTS[:1])  # the newest again
    state = one.state_dict()
    assert sorted(state["texts"]) == sorted(TEXTS) and state["texts"][-1] == TEXTS[0]
    assert state["vectors"].dtype == np.float32
    two.load_state_dict(state)
    assert two.stats()["cache_bytes"] == one.stats()["cache_bytes"] > 0
    np.testing.assert_array_equal(two.encode(TEXTS), one.encode(TEXTS))
    assert two.stats()["misses"] == 0

    small = load("auto", cache_bytes=one.stats()["cache_bytes"] // 2)
    small.load_state_dict(state)
    assert 0 < small.stats()["cache_entries"] < len(TEXTS)
    assert small.encode(TEXTS[:1]).shape == (1, 384) and small.stats()["misses"] == 0


def test_vectors_of_another_encoder_are_not_taken_over():
    one = load("auto")
    state = {"encoder": "another", "texts": ["a"], "vectors": np.zeros((1, 384), np.float32)}
    one.load_state_dict(state)
    one.load_state_dict(one.state_dict())  # empty
    assert one.stats()["cache_entries"] == 0
