"""Scores that several processes share."""

from guided_diffusion import checkpoint, dist_util


def gather_into(part, parts, monkeypatch, folder):
    """Gather the Evaluations `parts`, each as of a process of its own, into one of them."""
    sent = []
    monkeypatch.setattr(dist_util, "all_gather_objects", lambda value: [sent.append(value)] and [value])
    for each in parts:
        each.gather()
    checkpoint.save(folder / "sent", sent)  # as plain values and tensors, which need no pickle
    monkeypatch.setattr(dist_util, "all_gather_objects", lambda _: checkpoint.load(folder / "sent"))
    part.gather()
