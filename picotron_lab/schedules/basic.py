"""The simplest schedule: one stage, so gradient accumulation. Pipelines only have longer lists."""

from picotron_lab.schedules.actions import Action


def accumulation(microbatches: int) -> list[list[Action]]:
    """One rank, one stage: F0.0 BW0.0 F0.1 BW0.1 ... R0.

    Peak    activations of one micro-batch, however many there are
    """
    actions = []
    for i in range(microbatches):
        actions += [Action("F", 0, i), Action("BW", 0, i)]
    return [[*actions, Action("R", 0)]]
