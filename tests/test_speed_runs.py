"""Speed runs: what one run leaves behind for the next of the same process."""

from lib import engines
from lib.specs import LatencyModel, LatencySpec
from lib.speed_runs import ExportFolders, run_latency


def test_a_model_is_exported_once_for_all_engines_of_a_plan(monkeypatch):
    exported = []
    original = engines.export_onnx
    monkeypatch.setattr("lib.speed_runs.EXPORTS", ExportFolders(limit=100_000_000))
    monkeypatch.setattr("lib.engines.export_onnx", lambda *given: (exported.append(1), original(*given)))

    def timed(engine, **changes):
        models = {"dense": LatencyModel(architecture="tiny"), "less": LatencyModel(architecture="tiny", **changes)}
        spec = LatencySpec(
            models=models, dense="dense", engines=(engine,), batch=1, length=8, threads=1, rounds=1
        )  # fmt: skip
        return [row["name"] for row in run_latency(spec)["rows"]]

    assert timed("onnxruntime-fp32", drop=(4,)) == ["dense/onnxruntime-fp32", "less/onnxruntime-fp32"]
    assert len(exported) == 2
    timed("onnxruntime-int8", drop=(4,))
    assert len(exported) == 2
    timed("onnxruntime-fp32", drop=(3, 4))  # one that was not there yet
    assert len(exported) == 3


def test_exports_used_least_recently_go_first():
    folders = ExportFolders(limit=250)
    made = [folders.folder(LatencyModel(architecture="tiny", drop=(number,))) for number in (1, 2, 3)]
    assert len(set(made)) == 3
    for folder in made:
        (folder / "fp32.onnx").write_bytes(bytes(100))
    assert folders.folder(LatencyModel(architecture="tiny", drop=(1,))) == made[0]
    folders.shrink()
    assert [folder.exists() for folder in made] == [True, False, True]
    folders.shrink()
    assert [folder.exists() for folder in made] == [True, False, True]
    ExportFolders(limit=0).shrink()  # nothing was kept: nothing to do
