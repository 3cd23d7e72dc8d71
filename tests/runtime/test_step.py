"""A step in the compiled kernels gives what the loop in torch gives: each family, level, type, number of sequences."""

from pathlib import Path

import pytest
import torch

from decoct.model import open_model
from decoct.native.library import LEVELS, library
from decoct.runtime.decoder import Decoder
from decoct.runtime.kernels import Unpacking
from decoct.runtime.network import Feed
from decoct.weights import Dense
from tests.engine.running import RTN, make_base, run
from tests.runtime.test_decoder import FAST, PROMPT
from tests.tiny import save_model

FOUND = library()
pytestmark = pytest.mark.skipif(FOUND is None, reason="decoct was installed without its compiled kernels")
PROMPTS = [PROMPT, PROMPT[:1], PROMPT[4:9]]


def logits(network: Decoder, steps: int = 9, seats: int = 1) -> torch.Tensor:
    """Of prompts, then of the same tokens for every network, one each."""
    found = [network.advance([Feed(seat, PROMPTS[seat])]) for seat in range(seats)]
    found += [
        network.advance([Feed(seat, [3 + (7 * step + seat) % 50]) for seat in reversed(range(seats))])
        for step in range(steps)
    ]
    return torch.cat(found)


def in_torch(network: Decoder) -> Decoder:
    network._step = None
    return network


@pytest.mark.parametrize("level", FOUND.levels if FOUND else ())
@pytest.mark.parametrize("name", FAST)
def test_logits_are_those_of_the_loop_in_torch(name: str, level: str, tmp_path: Path) -> None:
    """Three sequences of several lengths, past the sliding window where there is one."""
    save_model(name, tmp_path)
    for dtype, largest in ((torch.float32, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.06)):
        network = Decoder(open_model(tmp_path), context=48, num_seats=3, dtype=dtype)
        assert network._step is not None
        network._step._network.level = LEVELS.index(level)
        wanted = logits(in_torch(Decoder(open_model(tmp_path), context=48, num_seats=3, dtype=dtype)), seats=3)
        assert (logits(network, seats=3) - wanted).abs().max() <= largest * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_model_far_into_its_context(stories: Path, dtype: torch.dtype) -> None:
    ours, wanted = (Decoder(open_model(stories), context=300, dtype=dtype) for _ in range(2))
    in_torch(wanted)
    largest = 1e-5 if dtype == torch.float32 else 0.05
    for start in range(0, 200, 50):
        for tokens in ([1 + (13 * (start + i)) % 500 for i in range(50)], [29 + start]):
            got, expected = (network.advance([Feed(0, tokens)]) for network in (ours, wanted))
            assert (got - expected).abs().max() <= largest * expected.abs().max()


def test_the_number_of_threads_changes_nothing(stories: Path) -> None:
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        network = Decoder(open_model(stories), context=80)
        network.advance([Feed(0, list(range(1, 60)))])
        torch.set_num_threads(threads)
        found.append(torch.cat([network.advance([Feed(0, [token])]) for token in range(7, 12)]))
    torch.set_num_threads(before)
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


def test_what_a_called_back_product_raises_is_raised(tmp_path: Path) -> None:
    """It cannot pass through the kernels; the next step works again."""
    base = make_base(tmp_path, "llama-tied")
    out = run(base, tmp_path / "out", {"quarot": {}}, RTN).folder
    network = Decoder(open_model(out), context=48)
    step = network._step
    assert step is not None
    called = step._called
    assert called
    network.advance([Feed(0, PROMPT)])
    good = network.advance([Feed(0, [5])])

    class Broken(Unpacking):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    whole, called[0] = called[0], Broken(Dense.of(torch.zeros(called[0].shape)))
    network._lengths[0] -= 1
    with pytest.raises(KeyboardInterrupt):
        network.advance([Feed(0, [5])])
    called[0] = whole
    assert torch.equal(network.advance([Feed(0, [5])]), good)
