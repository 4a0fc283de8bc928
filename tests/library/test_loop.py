from lightning_custom.loop import due


def test_due_every_and_last():
    assert [s for s in range(1, 8) if due(s, 3, last=7)] == [3, 6, 7]
