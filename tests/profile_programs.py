"""What ranks run in test_profile.py; a module of its own, so that processes can import it."""

from picotron_lab.config import ModelConfig
from picotron_lab.profile import ProfiledTrainer

MODEL = ModelConfig(vocab_size=64, hidden_size=16, layers=2, heads=2, kv_heads=2, ffn_size=24)


def record(world, mesh_cfg, cfg, wanted):
    """Per step the loss and all calls of the ledger, as (op, axis, bytes, place); then the report
    and whether a range is still made."""
    trainer = ProfiledTrainer(MODEL, mesh_cfg, cfg, world, wanted)
    losses, calls, ledger = [], [], trainer.mesh.world.ledger
    update = trainer.update

    def update_and_look(step):  # the last calls of a step, before the profile's own barriers
        norm = update(step)
        calls.append([(c.op, c.axis, c.bytes, c.place) for c in ledger.calls])
        return norm

    trainer.update = update_and_look
    for step in range(cfg.steps):
        losses.append(trainer.train_step(step)["loss"])
    return losses, calls, trainer.report, trainer.names.active
