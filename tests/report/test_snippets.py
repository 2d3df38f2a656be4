from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from flashsae.data.acts import Batch
from flashsae.data.sources import Chunk
from flashsae.errors import ConfigError, DataError
from flashsae.ops.code import SparseCode
from flashsae.ops.pattern import Pattern
from flashsae.report import snippets as module
from flashsae.report.snippets import collect_snippets


def words(ids: list[int]) -> list[str]:
    return [f" w{token}" for token in ids]


def of_dense(dense: Tensor, k: int) -> Callable[[Batch], SparseCode]:
    """An encoder whose inputs are row numbers and whose outputs are the k largest of those rows of `dense`."""

    def encode(batch: Batch) -> SparseCode:
        top = dense[batch["x"][:, 0].long()].topk(k, dim=1)
        return SparseCode.topk(top.values.relu(), top.indices, dense.shape[1])

    return encode


def one_chunk(ids: list[int], group: list[int], position: list[int], first: int = 0) -> Chunk:
    rows = torch.arange(first, first + len(ids), dtype=torch.float32)[:, None]
    return Chunk(
        {"x": rows},
        torch.tensor(group),
        torch.tensor(ids, dtype=torch.int32),
        torch.tensor(position, dtype=torch.int32),
    )


def documents(lengths: list[int], vocabulary: int = 50) -> Iterator[Chunk]:
    generator = torch.Generator().manual_seed(1)
    first = 0
    for number, length in enumerate(lengths):
        ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
        yield one_chunk(ids, [number] * length, list(range(length)), first)
        first += length


def test_every_number_equals_what_the_dense_code_says() -> None:
    lengths = [40, 3, 25, 60, 17, 55]
    tokens, d_sae, k = sum(lengths), 30, 4
    dense = torch.rand(tokens, d_sae, generator=torch.Generator().manual_seed(2)) - 0.85
    code = torch.zeros_like(dense)
    top = dense.topk(k, dim=1)
    code.scatter_(1, top.indices, top.values.clamp(min=0))
    found = collect_snippets(of_dense(dense, k), documents(lengths), words, n_latents=99, per_latent=3, context=5)

    assert found.tokens == tokens
    assert [latent.index for latent in found.latents] == (
        (code > 0).sum(0) >= module.MIN_ACTIVE
    ).nonzero().flatten().tolist()
    ids = torch.cat([chunk.token_ids for chunk in documents(lengths)])  # type: ignore[misc]
    group = torch.cat([chunk.group for chunk in documents(lengths)])
    for latent in found.latents:
        column = code[:, latent.index]
        active = column[column > 0]
        assert latent.density == len(active) / tokens
        assert latent.max_act == pytest.approx(float(active.max()), rel=1e-3)
        assert latent.mean_act == pytest.approx(float(active.mean()), rel=1e-3)
        assert sum(latent.histogram) == len(active)
        best = sorted((float(column[group == g].max()) for g in range(len(lengths))), reverse=True)[:3]
        peaks = [snippet.acts[snippet.peak] for snippet in latent.snippets]
        assert peaks == pytest.approx([peak for peak in best if peak > 0], rel=1e-3)
        total = torch.zeros(50).index_add_(0, ids.long(), column)
        assert latent.top_tokens[0] == f"w{int(total.argmax())}"
        row = int(column.argmax())
        inside = [r for r in range(row - 5, row + 6) if 0 <= r < tokens and group[r] == group[row]]
        assert latent.snippets[0].tokens == words(ids[inside].tolist())
        assert latent.snippets[0].acts == pytest.approx(column[inside].tolist(), rel=1e-3)


def test_windows_of_one_document_are_texts_of_their_own() -> None:
    """Positions that start again are another window: a snippet never runs across, and a document counts once."""
    dense = torch.tensor([[0.1], [0.2], [0.9], [1.0], [0.3], [0.4]])
    chunk = one_chunk([1, 2, 3, 4, 5, 6], [8] * 6, [0, 1, 2, 0, 1, 2])
    (latent,) = collect_snippets(of_dense(dense, 1), iter([chunk]), words, context=9).latents
    (snippet,) = latent.snippets
    assert snippet.tokens == [" w4", " w5", " w6"]
    assert snippet.peak == 0


def test_a_text_is_shown_once_and_ties_go_to_the_earlier() -> None:
    dense = torch.tensor([[0.5], [0.0], [0.5], [0.0], [0.7], [0.0], [0.5], [0.0]])
    chunk = one_chunk([1, 2, 1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 2, 2, 3, 3], [0, 1] * 4)
    (latent,) = collect_snippets(of_dense(dense, 1), iter([chunk]), words).latents
    assert [snippet.tokens for snippet in latent.snippets] == [[" w3", " w4"], [" w1", " w2"], [" w5", " w6"]]


def test_chosen_latents_spread_over_the_ranks_of_density() -> None:
    tokens, d_sae = 400, 40
    active = torch.arange(tokens)[:, None] < torch.arange(d_sae)[None, :] * 10  # latent j is active 10 j times
    dense = torch.where(active, 1.0, 0.0)
    chunk = one_chunk(list(range(tokens)), list(range(tokens)), [0] * tokens)
    found = collect_snippets(of_dense(dense, d_sae), iter([chunk]), words, n_latents=4, per_latent=1)
    assert [latent.index for latent in found.latents] == [5, 15, 25, 35]


def test_rare_latents_are_shown_only_if_there_are_no_others() -> None:
    tokens = 30
    dense = torch.zeros(tokens, 3)
    dense[:3, 2] = 1.0
    chunk = one_chunk(list(range(tokens)), list(range(tokens)), [0] * tokens)
    alone = collect_snippets(of_dense(dense, 3), iter([chunk]), words).latents
    dense[: module.MIN_ACTIVE, 0] = 1.0
    beside = collect_snippets(of_dense(dense, 3), iter([chunk]), words).latents
    assert [[latent.index for latent in latents] for latents in (alone, beside)] == [[2], [0]]


def test_nothing_that_fires_gives_no_latents() -> None:
    found = collect_snippets(of_dense(torch.zeros(4, 3), 2), iter([one_chunk([1] * 4, [0] * 4, [0, 1, 2, 3])]), words)
    assert found == module.Snippets(4, [], 4)


def test_reading_stops_at_max_tokens() -> None:
    def chunks() -> Iterator[Chunk]:
        yield one_chunk([1] * 6, [0] * 6, list(range(6)))
        yield one_chunk([2] * 6, [1] * 6, list(range(6)), first=6)
        raise AssertionError("read on behind the last token that is needed")

    found = collect_snippets(of_dense(torch.ones(12, 1), 1), chunks(), words, max_tokens=8, context=20)
    assert found.tokens == 8
    assert sorted(len(snippet.tokens) for snippet in found.latents[0].snippets) == [2, 6]


def test_plain_arrays_and_no_tokens_are_refused() -> None:
    plain = Chunk({"x": torch.zeros(2, 1)}, torch.arange(2))
    with pytest.raises(DataError, match="token_ids"):
        collect_snippets(of_dense(torch.ones(2, 1), 1), iter([plain]), words)
    with pytest.raises(DataError, match="no token"):
        collect_snippets(of_dense(torch.ones(2, 1), 1), iter([]), words)


@pytest.mark.parametrize("setting", [{"n_latents": 0}, {"per_latent": 0}, {"context": -1}, {"max_tokens": 0}])
def test_counts_below_the_least_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        collect_snippets(of_dense(torch.ones(1, 1), 1), iter([]), words, **setting)  # type: ignore[arg-type]


def test_held_out_documents_come_first_and_training_fills_up() -> None:
    """Latent 0 is active in three held-out documents and in two of training, more strongly there."""
    dense = torch.tensor([[0.1], [0.3], [0.2], [0.9], [0.8]])
    held_out = [one_chunk([1, 2, 3], [0, 1, 2], [0] * 3)]
    training = [one_chunk([4, 5], [3, 4], [0] * 2, first=3)]

    def shown(**settings: int) -> tuple[list[tuple[float, str]], int | None]:
        found = collect_snippets(of_dense(dense, 1), iter(held_out), words, training=iter(training), **settings)
        (latent,) = found.latents
        return [(s.acts[s.peak], str(s.split)) for s in latent.snippets], found.held_out_tokens

    everything = [(0.9, "train"), (0.8, "train"), (0.3, "held_out"), (0.2, "held_out"), (0.1, "held_out")]
    assert shown() == (everything, 3)
    assert shown(per_latent=4) == ([everything[0], *everything[2:]], 3)
    assert shown(per_latent=2) == (everything[2:4], 3)
    assert shown(max_tokens=4) == ([everything[0], *everything[2:]], 3)
    assert shown(max_tokens=2) == ([everything[2], everything[4]], 2)


def test_training_is_not_read_where_held_out_documents_are_enough() -> None:
    def training() -> Iterator[Chunk]:
        raise AssertionError("read documents of training")
        yield

    chunk = one_chunk([1] * 4, [0] * 4, [0, 1, 2, 3])
    found = collect_snippets(of_dense(torch.ones(4, 1), 1), iter([chunk]), words, training=training(), max_tokens=4)
    assert found.held_out_tokens == 4
    only = collect_snippets(of_dense(torch.ones(4, 1), 1), iter([]), words, training=iter([chunk]))
    assert only.held_out_tokens == 0
    assert only.latents[0].snippets[0].split == "train"


def test_a_text_goes_on_from_chunk_to_chunk_and_ends_where_a_token_is_missing() -> None:
    dense = torch.tensor([[0.1], [0.2], [0.9], [0.3], [0.4]])
    chunks = [one_chunk([1, 2], [8] * 2, [3, 4]), one_chunk([3, 4, 5], [8] * 3, [5, 6, 9], first=2)]
    (latent,) = collect_snippets(of_dense(dense, 1), iter(chunks), words).latents
    assert latent.snippets[0].tokens == [" w1", " w2", " w3", " w4"]


def test_codes_of_varying_length_give_the_same_texts_and_signs_count_by_their_size() -> None:
    """One of the latents has negative values; a token has 0 to 2 latents, and each chunk room for one more."""
    dense = torch.tensor([[0.5, 0.0], [0.0, 0.0], [1.0, -3.0], [0.0, -1.0]])

    def encode(batch: Batch) -> SparseCode:
        rows = dense[batch["x"][:, 0].long()]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), (rows != 0).sum(1).cumsum(0)])
        latents = torch.cat([rows.nonzero()[:, 1], torch.tensor([2])])
        return SparseCode(Pattern.rows(latents, starts, 2), torch.cat([rows[rows != 0], torch.zeros(1)]))

    chunks = [one_chunk([1, 2], [0, 0], [0, 1]), one_chunk([3, 4], [0, 0], [2, 3], first=2)]
    positive, negative = collect_snippets(encode, iter(chunks), words).latents
    assert (positive.density, positive.max_act, positive.mean_act) == (0.5, 1.0, 0.75)
    assert (negative.density, negative.max_act, negative.mean_act) == (0.5, -3.0, -2.0)
    assert [snippet.acts for snippet in negative.snippets] == [[0.0, 0.0, -3.0, -1.0]]
    assert negative.snippets[0].peak == 2
    assert sum(negative.histogram) == 2
    assert positive.least_act == negative.least_act == 0
    dense[1, 1] = 2.0
    assert collect_snippets(encode, iter(chunks), words).latents[1].least_act == 2.0
    assert negative.top_tokens[0] == "w3"


def test_a_window_is_widened_until_it_cuts_no_character() -> None:
    """Ids above 99 are first bytes of a character that the next id below completes."""

    def characters(ids: list[int]) -> list[str]:
        return ["" if token > 99 else f"c{token}" for token in ids]

    ids = [1, 100, 101, 2, 3, 102, 103, 4, 5]
    dense = torch.tensor([[0.0], [0], [0], [0], [1], [0], [0], [0], [0]])
    chunk = one_chunk(ids, [0] * 9, list(range(9)))
    (latent,) = collect_snippets(of_dense(dense, 1), iter([chunk]), characters, context=1).latents
    (snippet,) = latent.snippets
    assert snippet.tokens == ["", "", "c2", "c3", "", "", "c4"]
    assert snippet.acts[snippet.peak] == 1.0
    assert snippet.tokens[snippet.peak] == "c3"


def test_a_text_ends_where_a_packed_document_does() -> None:
    ids, group, position = list(range(12)), [3] * 5 + [4] * 7, list(range(12))  # one input of the model, no separator
    dense = torch.zeros(12, 1)
    dense[[4, 5], 0] = torch.tensor([2.0, 1.0])
    (latent,) = collect_snippets(of_dense(dense, 1), iter([one_chunk(ids, group, position)]), words).latents
    assert [snippet.tokens for snippet in latent.snippets] == [words([0, 1, 2, 3, 4]), words([5, 6, 7, 8, 9, 10, 11])]
