"""Log-probabilities over the vocabulary in parts against those computed at once."""

import pytest
import torch

from learner.vocabulary import vocabulary_logprobs


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
@pytest.mark.parametrize("tempered", [False, True])
def test_parts_give_the_log_probabilities_entropies_and_gradients_of_the_whole(
    rows: int, *, tempered: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(11, 8, generator=generator, requires_grad=True)
    head = torch.randn(50, 8, generator=generator, requires_grad=True)
    query = torch.randint(11, (23,), generator=generator)
    query[query == 4] = 5  # a query without a choice
    token = torch.randint(50, (23,), generator=generator)
    weight = torch.randn(23, generator=generator)
    divisor = torch.linspace(0.5, 2, 11) if tempered else None
    outcomes = []
    for bound in (10**9, 50 * rows):
        logprob, entropy = vocabulary_logprobs(
            hidden, head, query, token, divisor, max_logits=bound
        )
        gradients = torch.autograd.grad((logprob * weight).sum(), [hidden, head])
        assert not entropy.requires_grad
        outcomes.append([logprob.detach(), entropy, *gradients])
    for whole, parts in zip(*outcomes, strict=True):
        assert torch.allclose(whole, parts, atol=1e-5)
    logits = hidden.detach() @ head.detach().T
    logits = logits if divisor is None else logits / divisor[:, None]
    expected = torch.distributions.Categorical(logits=logits)
    assert torch.allclose(outcomes[0][1], expected.entropy(), atol=1e-5)
    assert torch.allclose(outcomes[0][0], expected.logits[query, token], atol=1e-5)
