import itertools
import math

import pytest
import torch

from lightning_custom.errors import ConfigError
from lightning_custom.tasks import FewShot, Sinusoids, Tasks, grey_images, minibatch_order, with_rotations


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def numbered(classes, examples):
    """Images of one pixel that tells its class and example."""
    return torch.arange(classes * examples).view(classes, examples, 1, 1)


SAMPLERS = {
    "sinusoids": Sinusoids(shots=3, query_shots=4),
    "few-shot": FewShot(numbered(30, 8), ways=5, shots=2, query_shots=3),
}
samplers = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


@samplers
def test_tasks_depend_on_the_generator_alone(sampler):
    torch.manual_seed(1)
    tasks = sampler(6, seeded())
    torch.manual_seed(2)
    torch.set_default_dtype(torch.float64)
    assert equal(sampler(6, seeded()), tasks)
    assert not equal(sampler(6, seeded(1)), tasks)


@samplers
def test_a_task_does_not_depend_on_how_many_are_drawn(sampler):
    many = sampler(40, seeded())
    for number in (1, 7, 39):
        assert equal(sampler(number, seeded()), [part[:number] for part in many])


@samplers
def test_tasks_of_one_draw_differ(sampler):
    tasks = sampler(20, seeded())
    assert len(torch.unique(tasks.support_inputs.flatten(1), dim=0)) == 20


def test_sinusoids_are_the_papers_formula():
    """Sample by sample, from the same uniform numbers in rows of amplitude, phase and places."""
    tasks = SAMPLERS["sinusoids"](5, seeded())
    uniform = torch.rand(5, 2 + 7, generator=seeded()).tolist()
    for i, (first, second, *rest) in enumerate(uniform):
        amplitude, phase = 0.1 + (5 - 0.1) * first, math.pi * second
        xs = [-5 + 10 * number for number in rest]
        ys = [amplitude * math.sin(x - phase) for x in xs]
        for found, expected in zip(tasks, (xs[:3], ys[:3], xs[3:], ys[3:]), strict=True):
            assert found.dtype == torch.float32
            assert found.shape == (5, len(expected), 1)
            assert torch.allclose(found[i, :, 0], torch.tensor(expected), rtol=0, atol=1e-5)


def test_drawn_waves_are_those_of_the_tasks():
    sampler = SAMPLERS["sinusoids"]
    amplitude, phase = sampler.draw(50, seeded())
    tasks = sampler(50, seeded())
    assert amplitude.shape == phase.shape == (50, 1, 1)
    for inputs, targets in (tasks[:2], tasks[2:]):
        assert torch.allclose(targets, amplitude * torch.sin(inputs - phase), rtol=0, atol=1e-6)


def test_waves_are_uniform_in_the_papers_ranges():
    number = 20_000
    sampler = Sinusoids(shots=1, query_shots=1)
    amplitude, phase = sampler.draw(number, seeded())
    for values, low, high in (
        (amplitude, 0.1, 5),
        (phase, 0, math.pi),
        (sampler(number, seeded()).query_inputs, -5, 5),
    ):
        values = values.double()
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        error = (high - low) / math.sqrt(12 * number)  # of the mean of uniform numbers
        assert abs(values.mean() - (low + high) / 2) < 4 * error
        assert values.std().item() == pytest.approx((high - low) / math.sqrt(12), rel=0.02)
    assert abs(torch.corrcoef(torch.stack([amplitude.flatten(), phase.flatten()]))[0, 1]) < 4 / math.sqrt(number)


def slow_few_shot(images, ways, shots, query_shots, uniform):
    """One task from its row of uniform numbers, by drawing from a list that shrinks by swapping."""

    def draw(numbers, size):
        left = list(range(size))
        for i, number in enumerate(numbers):
            j = i + int(number * (size - i))
            left[i], left[j] = left[j], left[i]
        return left[: len(numbers)]

    rows = iter(uniform)
    support, query = [], []
    for label, chosen in enumerate(draw(list(itertools.islice(rows, ways)), len(images))):
        examples = draw(list(itertools.islice(rows, shots + query_shots)), len(images[chosen]))
        support += [(images[chosen, example], label) for example in examples[:shots]]
        query += [(images[chosen, example], label) for example in examples[shots:]]
    return Tasks(
        *(
            torch.stack([torch.as_tensor(x) for x in part])
            for pairs in (support, query)
            for part in zip(*pairs, strict=True)
        )
    )


@pytest.mark.parametrize("ways, shots, query_shots", [(1, 1, 1), (5, 1, 2), (3, 4, 4), (6, 5, 3)])
def test_few_shot_tasks_equal_those_drawn_one_by_one(ways, shots, query_shots):
    images = torch.randint(0, 256, (6, 8, 2, 2), generator=seeded(3), dtype=torch.uint8)
    tasks = FewShot(images, ways=ways, shots=shots, query_shots=query_shots)(9, seeded())
    uniform = torch.rand(9, ways * (1 + shots + query_shots), generator=seeded(), dtype=torch.float64).tolist()
    slow = [slow_few_shot(images, ways, shots, query_shots, row) for row in uniform]
    for found, *expected in zip(tasks, *slow, strict=True):
        assert found.dtype == expected[0].dtype
        assert torch.equal(found, torch.stack(expected))


def test_labels_are_class_by_class_and_name_one_class_in_support_and_query():
    tasks = FewShot(numbered(9, 8), ways=4, shots=2, query_shots=3)(50, seeded())
    assert tasks.support_targets.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 50
    assert tasks.query_targets.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]] * 50
    assert tasks.query_targets.dtype == torch.int64
    support = (tasks.support_inputs // 8).view(50, 4, 2)
    query = (tasks.query_inputs // 8).view(50, 4, 3)
    for classes in (support, query):
        assert (classes == support[:, :, :1]).all()
    for task in support[:, :, 0].tolist():
        assert len(set(task)) == 4


def test_no_example_is_drawn_twice_in_a_task():
    tasks = FewShot(numbered(5, 7), ways=5, shots=3, query_shots=4)(200, seeded())
    both = torch.cat([tasks.support_inputs, tasks.query_inputs], dim=1).flatten(1)
    assert (both.sort(dim=1).values == torch.arange(35)).all()


def test_classes_labels_and_examples_are_uniform():
    number, classes, examples = 6000, 5, 4
    tasks = FewShot(numbered(classes, examples), ways=3, shots=1, query_shots=1)(number, seeded())
    drawn = torch.cat([tasks.support_inputs, tasks.query_inputs], dim=1).view(number, 2, 3)
    chosen, example = drawn[:, 0] // examples, drawn % examples

    def uniform(values, cells):
        """Each cell's count within five standard deviations of a binomial."""
        counts, share = values.flatten().bincount(minlength=cells), 1 / cells
        return (
            len(counts) == cells
            and ((counts - values.numel() * share).abs() < 5 * math.sqrt(values.numel() * share * (1 - share))).all()
        )

    for label in range(3):
        assert uniform(chosen[:, label], classes)
    for role in range(2):
        assert uniform(example[:, role], examples)
    # Of pairs of classes, and of support and query example, each ordered pair of different ones is as likely.
    for first, second, size in (
        (chosen[:, 0], chosen[:, 1], classes),
        (chosen[:, 1], chosen[:, 2], classes),
        (example[:, 0, 0], example[:, 1, 0], examples),
    ):
        pair = first * (size - 1) + second - (second > first).long()
        assert uniform(pair, size * (size - 1))
    assert not uniform(torch.zeros(number, dtype=torch.int64), classes)


def test_images_keep_their_dtype_until_the_transform():
    images = torch.randint(0, 256, (6, 4, 2, 2), generator=seeded(), dtype=torch.uint8)
    plain = FewShot(images, ways=3, shots=1, query_shots=2)(4, seeded())
    assert plain.support_inputs.dtype == torch.uint8
    assert plain.support_inputs.shape == (4, 3, 2, 2)
    tasks = FewShot(images, ways=3, shots=1, query_shots=2, transform=grey_images)(4, seeded())
    assert tasks.query_inputs.shape == (4, 6, 1, 2, 2)
    assert torch.equal(tasks.query_inputs[:, :, 0], plain.query_inputs.float() / 255)
    assert torch.equal(tasks.query_targets, plain.query_targets)


def test_rotations_are_those_of_torch_and_new_classes():
    images = torch.randint(0, 256, (3, 2, 4, 4), generator=seeded(), dtype=torch.uint8)
    turned = with_rotations(images)
    assert (turned.shape, turned.dtype) == ((12, 2, 4, 4), torch.uint8)
    for turns, chosen, example in itertools.product(range(4), range(3), range(2)):
        assert torch.equal(turned[turns * 3 + chosen, example], torch.rot90(images[chosen, example], turns, (0, 1)))
    assert torch.equal(with_rotations(images.unsqueeze(2)), turned.unsqueeze(2))


def test_a_rotation_turns_counterclockwise():
    image = torch.tensor([[1, 2], [3, 4]]).view(1, 1, 2, 2)
    assert with_rotations(image).flatten(1).tolist() == [[1, 2, 3, 4], [2, 4, 1, 3], [4, 3, 2, 1], [3, 1, 4, 2]]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Sinusoids(shots=0), "shots: 0; give at least 1"),
        (lambda: Sinusoids(query_shots=-1), "query_shots: -1; give at least 1"),
        (lambda: FewShot(numbered(4, 4), ways=0, shots=1, query_shots=1), "ways: 0; give at least 1"),
        (
            lambda: FewShot(numbered(4, 4), ways=5, shots=1, query_shots=1),
            "ways: 5, but there are 4 classes; give at most 4",
        ),
        (
            lambda: FewShot(numbered(4, 4), ways=2, shots=2, query_shots=3),
            "query_shots: 3 beside 2 shots, but a class has 4 examples; give at most 4 together",
        ),
        (
            lambda: FewShot(torch.zeros(5), ways=2, shots=2, query_shots=3),
            r"images: shape \(5,\); give \[classes, examples",
        ),
        (lambda: with_rotations(torch.zeros(2, 2, 3, 4)), r"images: shape \(2, 2, 3, 4\); give square ones"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_every_class_and_example_can_be_used():
    assert FewShot(numbered(4, 4), ways=4, shots=1, query_shots=3)(2, seeded()).query_inputs.shape == (2, 12, 1, 1)


@pytest.mark.parametrize("steps, batch_size", [(5, 4), (2, 7), (1, 3)])
def test_minibatches_are_shuffled_passes_cut_one_after_another(steps, batch_size):
    order = minibatch_order(3, 7, steps=steps, batch_size=batch_size, generator=torch.Generator().manual_seed(0))
    assert order.shape == (3, steps, batch_size)
    for row in order.flatten(1):
        for part in row.split(7):
            assert len(set(part.tolist())) == len(part)
    assert not torch.equal(order[0], order[1])


def test_a_minibatch_larger_than_its_task_has_every_sample():
    order = minibatch_order(2, 3, steps=4, batch_size=10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(order.sort(-1).values, torch.arange(3).expand(2, 4, -1))
