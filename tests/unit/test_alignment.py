"""A teacher with another tokenizer gets the student's bytes, and the sync points are exactly the tokens that end after
the same bytes."""

import functools
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.demo.tokenizer import build_tokenizer
from megatron_oprd.data.alignment import make_aligner, sync_points
from megatron_oprd.data.end_tokens import end_of_turn_id
from megatron_oprd.data.token_bytes import byte_encoder, token_bytes
from megatron_oprd.types import UserError
from tests.helpers import vocabularies
from tests.helpers.responses import UNKNOWN_ID, Speller, brute_force, ids_of, random_response, tokenizer_named
from tests.helpers.tokenizer import CHAT_TEMPLATE, byte_tokenizer

NAMES = ("qwen", "llama_3", "phi_4_mini", "llama_2", "gemma")
PAIRS = [
    *(("qwen", name) for name in NAMES[1:]),
    *((name, "qwen") for name in NAMES[1:]),
    *(("llama_3", "phi_4_mini"), ("phi_4_mini", "llama_2"), ("llama_2", "gemma"), ("gemma", "llama_3")),
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folders = functools.cache(tmp_path_factory.mktemp)
    return lambda name: tokenizer_named(name, folders(name))


@pytest.fixture(scope="module")
def aligners(tokenizers):
    @functools.cache
    def make(student, teacher):
        student, teacher = tokenizers(student), tokenizers(teacher)
        return make_aligner(
            student, teacher, student_eos_ids=[student.eos_token_id], teacher_end_of_turn_id=end_of_turn_id(teacher)
        )

    return make


@pytest.fixture(scope="module")
def spellers(tokenizers, tmp_path_factory):
    return functools.cache(lambda name: Speller.of(name, tokenizers(name), tmp_path_factory.mktemp(f"model-of-{name}")))


@pytest.mark.parametrize("count", [500, pytest.param(2000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_sync_points_are_the_tokens_that_end_after_the_same_bytes(
    student, teacher, count, tokenizers, aligners, spellers
):
    generator = random.Random(f"{student} {teacher}")
    aligner, eos = aligners(student, teacher), tokenizers(student).eos_token_id
    for _ in range(count):
        response = random_response(generator, tokenizers(student))
        alignment = aligner.align(response)
        ended = response[-1:] == [eos]
        text_ids = response[: len(response) - ended]
        teacher_ids = list(alignment.teacher_ids[: len(alignment.teacher_ids) - ended])
        said, read = spellers(student).prefixes(text_ids), spellers(teacher).prefixes(teacher_ids)
        expected = brute_force(said, read) + [(len(said), len(read))] * ended
        pairs = list(zip(alignment.student_positions, alignment.teacher_positions, strict=True))
        assert pairs == expected, response
        assert said[-1:] == read[-1:] or not said[-1], response  # the teacher reads every byte and no other
        assert alignment.coverage == (len(pairs) / len(response) if response else 1)
        if ended:
            assert alignment.teacher_ids[-1] == end_of_turn_id(tokenizers(teacher))
        _decoded_text_is_equal(
            generator, pairs[: len(pairs) - ended], said, text_ids, teacher_ids, student, teacher, tokenizers
        )


def _decoded_text_is_equal(generator, pairs, said, text_ids, teacher_ids, student, teacher, tokenizers):
    """Compare the decoded texts at one of the pairs. The two decoders agree on valid UTF-8 only."""
    if not pairs:
        return
    t, u = generator.choice(pairs)
    if said[t].decode("utf-8", "replace").encode() != said[t]:
        return
    texts = [
        tokenizers(name).decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for name, ids in ((student, text_ids[: t + 1]), (teacher, teacher_ids[: u + 1]))
    ]
    assert texts[0] == texts[1] == said[t].decode()


@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_any_bytes_have_these_bytes(name, aligners):
    student = "phi_4_mini" if name != "phi_4_mini" else "llama_3"
    encoder, generator = aligners(student, name).teacher, random.Random(name)
    for _ in range(500):
        text = generator.choice([b"", b" ", "▁中".encode()]) + generator.randbytes(generator.randint(0, 20))
        assert encoder.tokens.spell(encoder.encode(text))[0] == text


TEXTS = ["Hello world", "x = 12345 + 1", "由此可得 😀", "def f(x):\n    return  x\n", "naïve \t end  ", "a" * 3000]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_returns_the_ids_of_the_tokenizer(name, text, tokenizers, aligners):
    tokenizer, student = tokenizers(name), "phi_4_mini" if name != "phi_4_mini" else "llama_3"
    alignment = aligners(student, name).align(ids_of(tokenizers(student), text))
    assert list(alignment.teacher_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]


def pieces_of(tokenizer, *pieces):
    return tokenizer.convert_tokens_to_ids(list(pieces))


def pairs_of(alignment):
    return list(zip(alignment.student_positions, alignment.teacher_positions, strict=True))


def test_tokens_that_split_a_character_have_sync_points_at_equal_bytes(tokenizers, aligners):
    llama_2, phi = tokenizers("llama_2"), tokenizers("phi_4_mini")
    by_bytes = pieces_of(llama_2, "▁", "<0xE9>", "<0xBE>", "<0x98>", "<0x31>", "<0x32>")  # 龘12
    alignment = aligners("llama_2", "qwen").align(by_bytes)
    assert tokenizers("qwen").decode(alignment.teacher_ids) == "龘12"
    read = aligners("llama_2", "qwen").teacher.tokens.spell(alignment.teacher_ids)[1].tolist()
    assert pairs_of(alignment) == [(end, read.index(end)) for end in (1, 2, 3, 4, 5) if end in read]
    assert {(3, read.index(3)), (5, read.index(5))} <= set(pairs_of(alignment))
    # Both spell an unknown character by its bytes, after the leading space that is not in the text.
    assert pairs_of(aligners("phi_4_mini", "llama_2").align(ids_of(phi, "龘"))) == [(0, 1), (1, 2), (2, 3)]


def test_invalid_utf8_does_not_remove_later_sync_points(tokenizers, aligners):
    phi, gemma = tokenizers("phi_4_mini"), tokenizers("gemma")
    cut = ids_of(phi, "x 龘")[:-1]  # two of its three bytes
    assert pairs_of(aligners("phi_4_mini", "gemma").align(cut))[-1][0] == len(cut) - 1
    alignment = aligners("phi_4_mini", "gemma").align(cut + ids_of(phi, " and 1 + 1"))
    assert "�" in phi.decode(cut)
    assert gemma.decode(alignment.teacher_ids).endswith(" and 1 + 1")
    assert alignment.student_positions[-1] == alignment.student_tokens - 1


def test_unicode_is_not_normalised(tokenizers, aligners):
    text = "e\u0301 \u2126 \u212b x"  # Qwen's tokenizer writes each as another character
    ids = ids_of(tokenizers("llama_3"), text)
    alignment = aligners("llama_3", "qwen").align(ids)
    assert tokenizers("qwen").decode(alignment.teacher_ids) == text
    assert alignment.student_positions[-1] == len(ids) - 1


def test_only_an_eos_becomes_the_end_of_turn(tokenizers, aligners):
    llama, phi = tokenizers("llama_3"), tokenizers("phi_4_mini")
    aligner, text, eos, end = aligners("llama_3", "phi_4_mini"), ids_of(llama, "Hello 12"), llama.eos_token_id, 1501
    assert phi.convert_ids_to_tokens(end) == "<|end|>"
    truncated, ended = aligner.align(text), aligner.align([*text, eos])
    assert end not in truncated.teacher_ids
    assert ended.teacher_ids == (*truncated.teacher_ids, end)
    assert pairs_of(ended) == [*pairs_of(truncated), (len(text), len(truncated.teacher_ids))]
    assert pairs_of(aligner.align([eos])) == [(0, 0)]
    assert aligner.align([eos]).teacher_ids == (end,)
    # In between it says nothing and ends nothing.
    assert aligner.align([eos, *text]).teacher_ids == truncated.teacher_ids
    # Of several EOS tokens each ends a response; another special token does not.
    other = llama.convert_tokens_to_ids("<|end_of_text|>")
    assert aligner.align([*text, other]).teacher_ids == truncated.teacher_ids
    both = make_aligner(llama, phi, student_eos_ids=[other, eos], teacher_end_of_turn_id=end)
    assert both.align([*text, other]) == both.align([*text, eos]) == ended


def test_an_empty_response_has_no_sync_points(aligners):
    for teacher in ("llama_2", "gemma", "phi_4_mini"):
        alignment = aligners("qwen", teacher).align([])
        assert (alignment.teacher_ids, alignment.student_positions, alignment.coverage) == ((), (), 1.0)


def test_the_same_tokenizer_keeps_the_sampled_ids_and_every_position(tmp_path):
    tokenizer = vocabularies.llama_3_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    aligner = make_aligner(tokenizer, again, student_eos_ids=[1004], teacher_end_of_turn_id=0)
    never_encoded = [*ids_of(tokenizer, "i"), *ids_of(tokenizer, "n"), 1003, 255, UNKNOWN_ID, 1004]
    assert ids_of(tokenizer, "in") != never_encoded[:2]
    alignment = aligner.align(never_encoded)
    assert alignment.teacher_ids == tuple(never_encoded)
    assert alignment.student_positions == alignment.teacher_positions == tuple(range(6))
    assert alignment.coverage == 1
    cut = aligner.align(never_encoded, prompt_tokens=10, max_tokens=14)
    assert (cut.teacher_ids, cut.student_positions) == (tuple(never_encoded[:4]), (0, 1, 2, 3))


def test_a_tokenizer_of_any_kind_is_aligned_with_itself():
    aligner = make_aligner(build_tokenizer(), build_tokenizer(), student_eos_ids=[1], teacher_end_of_turn_id=1)
    assert aligner.align([5, 6, 1]).teacher_ids == (5, 6, 1)


def test_special_tokens_have_no_bytes_and_their_text_is_ordinary_text(tokenizers, aligners):
    llama, phi = tokenizers("llama_3"), tokenizers("phi_4_mini")
    text = [*ids_of(llama, "a"), 1002, 1003, UNKNOWN_ID, *ids_of(llama, " b")]
    alignment = aligners("llama_3", "phi_4_mini").align(text)
    assert phi.decode(alignment.teacher_ids) == "a b"
    assert pairs_of(alignment) == [(0, 0), (4, 1)]
    # The student spelled it out: the teacher must not take it for the end of its turn.
    spelled = aligners("llama_3", "phi_4_mini").align(ids_of(llama, "x <|end|> y"))
    assert phi.decode(spelled.teacher_ids) == "x <|end|> y"
    assert not {1500, 1501, 1502, 1503} & set(spelled.teacher_ids)


def test_an_added_token_of_the_teacher_is_used_and_keeps_the_spaces_around_it(tokenizers, aligners):
    phi = tokenizers("phi_4_mini")
    alignment = aligners("qwen", "phi_4_mini").align(ids_of(tokenizers("qwen"), "a <think> b"))
    assert phi.convert_tokens_to_ids("<think>") in alignment.teacher_ids
    assert phi.decode(alignment.teacher_ids) == "a <think> b"
    assert alignment.student_positions[-1] == alignment.student_tokens - 1
    back = aligners("phi_4_mini", "qwen").align(alignment.teacher_ids)
    assert tokenizers("qwen").decode(back.teacher_ids) == "a <think> b"


@pytest.mark.parametrize("text", ["Hello", " Hello", "  Hello", " ", "   ", "▁Hello", "\nHello"])
def test_the_leading_space_of_sentencepiece_is_not_in_the_text(text, tokenizers, aligners):
    for name in ("llama_2", "legacy_llama_2"):
        alignment = aligners("llama_3", name).align(ids_of(tokenizers("llama_3"), text))
        assert alignment.student_positions[-1] == alignment.student_tokens - 1
        if "▁" not in text:
            assert tokenizers(name).decode(alignment.teacher_ids) == text
        back = aligners(name, "llama_3").align(alignment.teacher_ids)
        assert tokenizers("llama_3").decode(back.teacher_ids) == text
        assert back.student_positions[-1] == back.student_tokens - 1


def test_old_and_new_files_of_a_sentencepiece_model_give_the_same_bytes(tokenizers):
    new, old = tokenizers("llama_2"), tokenizers("legacy_llama_2")
    assert token_bytes(new) == token_bytes(old)
    assert byte_encoder(new).encode(b" a  \xff b") == byte_encoder(old).encode(b" a  \xff b")


def test_tokens_beyond_the_teachers_limit_are_cut_with_their_sync_points(tokenizers, aligners):
    aligner, llama = aligners("llama_3", "phi_4_mini"), tokenizers("llama_3")
    response = [*ids_of(llama, "x = 1234 + 5678 = 6912, naïve 龘"), llama.eos_token_id]
    complete = aligner.align(response)
    length = len(complete.teacher_ids)
    assert aligner.align(response, prompt_tokens=7, max_tokens=7 + length) == complete
    for room in range(length):
        cut = aligner.align(response, prompt_tokens=7, max_tokens=7 + room)
        assert cut.teacher_ids == complete.teacher_ids[:room]
        assert cut.teacher_tokens_cut == length - room
        assert pairs_of(cut) == [(t, u) for t, u in pairs_of(complete) if u < room]
        assert cut.student_tokens == len(response)
    assert aligner.align(response, prompt_tokens=9, max_tokens=7).teacher_ids == ()


def test_positions_are_selected_before_sync_points_are_considered(tokenizers, aligners):
    ids = ids_of(tokenizers("qwen"), "x = 1234 + 5678")
    alignment = aligners("qwen", "llama_3").align(ids)
    assert len(pairs_of(alignment)) < len(ids)
    last = range(len(ids) - 4, len(ids))
    kept = [(t, u) for t, u in pairs_of(alignment) if t in last]
    assert 0 < len(kept) < 4
    assert list(zip(*alignment.comparable(last), strict=True)) == kept
    assert alignment.comparable([]) == ((), ())
    assert aligners("qwen", "llama_3").align([]).comparable([]) == ((), ())


@pytest.mark.parametrize("shift", [0, -1])
@pytest.mark.parametrize(("student", "teacher"), [("qwen", "llama_3"), ("llama_2", "qwen"), ("bytes", "gemma")])
def test_compared_states_are_those_after_the_same_bytes(student, teacher, shift, tokenizers, aligners, spellers):
    """With shift -1 the compared state is that of the preceding token; before the first token no byte has been read."""
    generator, aligner, eos = random.Random(shift), aligners(student, teacher), tokenizers(student).eos_token_id
    nothing_yet, ends = 0, 0
    for _ in range(500):
        response = random_response(generator, tokenizers(student))
        room = generator.choice([None, 0, 1, 4])
        alignment = aligner.align(response, max_tokens=room)
        complete = aligner.align(response)
        ended = response[-1:] == [eos]
        said = spellers(student).prefixes(response[: len(response) - ended])
        read = spellers(teacher).prefixes(list(complete.teacher_ids[: len(complete.teacher_ids) - ended]))
        comparable = {*brute_force(said, read), (-1, -1)} | ({(len(said), len(read))} if ended else set())
        positions = sorted(generator.sample(range(len(response)), generator.randint(0, len(response))))
        last_state = len(alignment.teacher_ids) - 1
        expected = [
            (t, u)
            for t in positions
            for u in range(len(complete.teacher_ids) + 2)
            if (t + shift, u + shift) in comparable and u + shift <= last_state
        ]
        assert list(zip(*alignment.comparable(positions, shift), strict=True)) == expected, response
        nothing_yet += (0, 0) in expected
        ends += any(u == len(alignment.teacher_ids) for _, u in expected)
    assert nothing_yet and bool(ends) == (shift == -1), "the edges are among the cases"


def test_there_is_no_sync_point_after_the_first_different_byte():
    ends = np.array([1, 2, 2, 4, 5])
    assert [each.tolist() for each in sync_points(b"abcde", ends, b"abcde", np.array([0, 2, 5]))] == [[1, 4], [1, 2]]
    assert [each.tolist() for each in sync_points(b"abcde", ends, b"abXde", np.array([0, 2, 5]))] == [[1], [1]]
    assert [each.tolist() for each in sync_points(b"abcde", ends, b"", np.array([], np.int64))] == [[], []]


def test_sync_points_end_before_a_character_that_the_teacher_lacks():
    poor = Tokenizer(models.BPE({character: index for index, character in enumerate("abcĠ")}, []))
    poor.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    poor.decoder = decoders.ByteLevel()
    student, poor = byte_tokenizer(), PreTrainedTokenizerFast(tokenizer_object=poor)
    aligner = make_aligner(student, poor, student_eos_ids=[258], teacher_end_of_turn_id=9)
    for rest, points in (("c a", 5), ("xc a", 2), ("xxab", 2), ("中a", 2)):
        response = [*ids_of(student, "ab" + rest), 258]
        alignment = aligner.align(response)
        assert alignment.teacher_ids[-1] == 9
        assert pairs_of(alignment) == [(t, t) for t in range(points)] + [(5, 5)] * (rest == "c a")


def test_a_truncation_setting_of_the_tokenizer_does_not_cut_a_response(tokenizers):
    teacher = vocabularies.llama_3_tokenizer()
    teacher.backend_tokenizer.enable_truncation(4)
    teacher.backend_tokenizer.enable_padding(length=50)
    encoder = byte_encoder(teacher)
    assert encoder.tokens.spell(encoder.encode(b"one two three four five six"))[0] == b"one two three four five six"
    assert teacher.backend_tokenizer.truncation["max_length"] == 4  # the tokenizer itself is as it was


def other_kinds():
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    pieces = Tokenizer(models.BPE({"▁": 0, "a": 1}, []))  # no byte fallback: a text can hold what no token says
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return [build_tokenizer(), *(PreTrainedTokenizerFast(tokenizer_object=each) for each in (words, pieces))]


@pytest.mark.parametrize("other", other_kinds())
def test_other_kinds_of_tokenizer_raise_an_error_that_names_the_folder(other, tmp_path):
    other.save_pretrained(tmp_path)
    other = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for pair in ((other, byte_tokenizer()), (byte_tokenizer(), other)):
        with pytest.raises(UserError, match="byte-level BPE or a SentencePiece model") as caught:
            make_aligner(*pair, student_eos_ids=[1], teacher_end_of_turn_id=1)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "token"),
    [("llama_3", "<|eot_id|>"), ("phi_4_mini", "<|end|>"), ("llama_2", "</s>"), ("gemma", "</s>")],
)
def test_the_end_of_turn_is_the_token_that_the_chat_template_writes(name, token, tokenizers):
    tokenizer = tokenizers(name)
    assert tokenizer.convert_ids_to_tokens(end_of_turn_id(tokenizer)) == token


def test_without_a_chat_template_the_end_of_turn_is_the_eos():
    tokenizer = byte_tokenizer(chat=CHAT_TEMPLATE)
    tokenizer.eos_token = "<|endoftext|>"
    assert end_of_turn_id(tokenizer) == 258  # <|im_end|>
    for template in (None, "{{ messages[0].content }}", "{{ raise_exception('no') }}", "{{ messages[1].content }} ###"):
        tokenizer.chat_template = template
        assert end_of_turn_id(tokenizer) == 256
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no token that ends an answer"):
        end_of_turn_id(tokenizer)
