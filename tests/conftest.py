"""Models for the tests: tiny random decoders, tiny tasks as one reads them, the embedded model."""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import steered
import tiny_tasks
import torch
from tiny import build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lib.engine import store
from lib.engine.models import Decoder, load_decoder
from lib.evidence.by_task import each
from lib.evidence.steering import Steering, prepare_steering
from lib.evidence.tasks import Pairs
from lib.evidence.transfer import Trial, choose_pairs, read_tasks
from lib.science.estimate import Untested

N_BOOKS = int(os.environ.get("N_BOOKS", "200"))
"""Books that are simulated to see how often verdicts err; `make error-rates` takes more."""
ARCHITECTURES = (
    "llama",
    "mistral",  # a window shorter than the prompts
    "gemma3_text",  # windows in turn, soft caps, a normed query
    "gpt2",  # learned positions
    "gpt_neox",  # attention and MLP side by side
    "opt",  # its causal model passes the base model by
    "bloom",  # biases in place of positions
    "cohere",  # scaled logits
    "mixtral",  # experts
    "deepseek_v3",  # latent attention
    "mamba",  # state-space
    "bamba",  # state-space and attention in turn
    "granitemoehybrid",  # whose cache refuses to be built or repeated
    "minimax",  # linear attention
)
"""One of each kind; `make architectures` tries all that transformers has."""


@pytest.fixture
def told(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Tell how often a verdict errs in simulation, for `make error-rates` to write down."""

    def tell(claim: str, statistic: str, place: str = "", **rates: float) -> None:
        record_property(f"{claim}, {statistic}, {place}", json.dumps(rates))

    return tell


@pytest.fixture(autouse=True, scope="session")
def _own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the tests' states out of the book's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "STORE", tmp_path_factory.mktemp("store"))
        yield


def tiny_model(architecture: str) -> Any:
    """Return a random model whose logits are of the size of a trained model's, not near zero."""
    torch.manual_seed(7)
    model = build(architecture).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                if parameter.std() < 0.05:  # state-space weights start at their own size
                    parameter.mul_(8.0 if "embed" not in name else 4.0)
            else:  # biases and gains, which start as all zeros and all ones
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tiny_tokenizer(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are whole words."""
    vocabulary = {word: index for index, word in enumerate(words or [f"w{i}" for i in range(64)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=next(iter(vocabulary)))


class WithoutFloat64(torch.Tensor):
    """A tensor as on Apple's GPUs: no float64 until it is on the CPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.double:
            raise TypeError("the MPS framework doesn't support float64")
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(torch.Tensor) if func is torch.Tensor.cpu else result


def count_tokens(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of tokens of each pass over the model."""
    passes: list[int] = []
    forward = decoder.model.base_model.forward

    def counting(input_ids: torch.Tensor, **options: object) -> object:
        passes.append(input_ids.numel())
        return forward(input_ids, **options)

    monkeypatch.setattr(decoder.model.base_model, "forward", counting)
    return passes


@pytest.fixture(scope="session", params=sorted(ARCHITECTURES))
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """A tiny random decoder, once per architecture."""
    return load_decoder(tiny_model(request.param), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="session")
def llama() -> Decoder:
    return load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="session")
def tiny_trials() -> dict[str, Trial | Untested]:
    """Two tasks, "tiny" and "other", as a tiny random network reads them."""
    decoder = load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer(tiny_tasks.WORDS))
    other = tiny_tasks.tiny_task(decoder, "other", templates=["t4 {subject} t1"])
    return read_tasks(decoder, {"tiny": tiny_tasks.tiny_task(decoder), "other": other})


@pytest.fixture(scope="session")
def trial(tiny_trials: dict[str, Trial]) -> Trial:
    return tiny_trials["tiny"]


@pytest.fixture(scope="session")
def pairs(trial: Trial) -> Pairs | Untested:
    return choose_pairs(trial, n_donors=3)


@pytest.fixture(scope="session")
def reader() -> Decoder:
    """A tiny random decoder that knows words enough for prompts in English."""
    words = ["?", *(f"w{k}" for k in range(1, 57)), "of", "comes", "the", "word", "has", "then"]
    return load_decoder(tiny_model("llama"), tokenizer=tiny_tokenizer(words))


@pytest.fixture(scope="session")
def trials() -> dict[str, Trial]:
    """Two tasks that a tiny decoder is able to do."""
    words = tiny_tokenizer(steered.WORDS)
    return steered.able_trials(load_decoder(tiny_model("llama"), tokenizer=words))


@pytest.fixture(scope="session")
def able(trials: dict[str, Trial]) -> Trial:
    return trials["tiny"]


@pytest.fixture(scope="session")
def steerings(trials: dict[str, Trial]) -> dict[str, Any]:
    return each(trials, lambda one: prepare_steering(one, steered.BLOCK))


@pytest.fixture(scope="session")
def steering(steerings: dict[str, Any]) -> Steering:
    return steerings["tiny"]


@pytest.fixture(scope="session")
def embedded() -> Decoder:
    """The embedded model, real weights."""
    return load_decoder()


@pytest.fixture(scope="session")
def embedded_twin() -> Decoder:
    """Its untrained twin."""
    return load_decoder(untrained=True)
