"""One update against the policy gradient written out, episode by episode."""

import math

import pytest
import torch

from lightning_custom.environments.evaluation import EpisodePlayer
from lightning_custom.environments.makers import MakeEnvironment
from lightning_custom.precision import unwrap
from lightning_custom.testing import single_process
from recipes import reinforce


def config(folder, **fields):
    return reinforce.ReinforceConfig(
        **{"steps": 1, "episodes": 4, "width": 8, "val_episodes": 2, "validate_every": 0, "accelerator": "cpu"}
        | {"max_grad_norm": 0.0, "lr": 0.0, "run_dir": str(folder), "discount": 0.9}
        | fields
    )


def one_update(settings):
    """The state after an update with a learning rate of 0, and the episodes that it was made from."""
    kept = []
    played = EpisodePlayer.played

    def keep(self, *arguments):
        kept.append(played(self, *arguments))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpisodePlayer, "played", keep)
        state = reinforce.train(single_process("64-true"), settings, make_env=MakeEnvironment(settings.env))
    return unwrap(state.agent), kept[0]


def written_out(agent, played, *, baseline, discount):
    """The loss of Williams 1992 for each step of each episode, its mean over steps."""
    total = torch.zeros((), dtype=torch.float64)
    for episode in range(len(played.episodes)):
        rows = [i for i, of in enumerate(played.episode_of) if of == episode]
        worth = 0.0
        if played.truncated[episode] and baseline:
            worth = float(agent(torch.from_numpy(played.final_observations[episode : episode + 1]).double())[1])
        for row in reversed(rows):
            worth = played.rewards[row] + discount * worth
            logits, value = agent(torch.from_numpy(played.observations[row : row + 1]).double())
            advantage = worth - float(value.detach()) if baseline else worth
            total = total - advantage * torch.log_softmax(logits, 1)[0, played.actions[row]]
            if baseline:
                total = total + 0.5 * 0.5 * (value[0] - worth) ** 2
    return total / len(played.rewards)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("baseline", [True, False])
def test_gradient_is_the_policy_gradient_written_out(baseline, tmp_path):
    settings = config(tmp_path, baseline=baseline, normalise_advantages=False)
    agent, played = one_update(settings)
    assert len({episode.length for episode in played.episodes}) > 1
    found = [None if part.grad is None else part.grad.clone() for part in agent.parameters()]
    loss = written_out(agent, played, baseline=baseline, discount=0.9)
    expected = torch.autograd.grad(loss, list(agent.parameters()), allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_advantages_are_normalised_over_all_steps():
    found = reinforce.normalised(single_process(), torch.tensor([1.0, 2.0, 6.0]), 3)
    mean, deviation = 3.0, math.sqrt((4 + 1 + 9) / 3)
    assert found.tolist() == pytest.approx([(value - mean) / deviation for value in (1, 2, 6)])


def test_other_steps_play_other_episodes(tmp_path):
    _, first = one_update(config(tmp_path / "a"))
    _, again = one_update(config(tmp_path / "b"))
    _, other = one_update(config(tmp_path / "c", seed=1))
    assert first.observations.tolist() == again.observations.tolist()
    assert first.observations[0].tolist() != other.observations[0].tolist()
