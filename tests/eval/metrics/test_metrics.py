"""Metrics: identity is perfect, known inputs give torchmetrics' own value, too few images give a reason."""

import importlib
import math
import sys

import pytest
import torch
from messages import names, says
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.multimodal.clip_score import CLIPScore

from dit_accel.errors import DitAccelError
from dit_accel.eval import metric as machinery
from dit_accel.eval import metrics
from dit_accel.eval.metric import Scored, TooFew, choose
from dit_accel.eval.metrics.agreement import clip_score, frame_agreement
from dit_accel.eval.metrics.likeness import temporal_psnr
from dit_accel.eval.metrics.sets import Fid, Kid

CPU = torch.device("cpu")


class Network(torch.nn.Module):
    """A custom extractor for torchmetrics' own classes."""

    num_features = 6

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.is_floating_point() and images.max() <= 1
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) @ self.weight


@pytest.fixture
def sets():
    """Two sets of images, float [40, 3, 8, 8] in [0, 1], of different brightness."""
    torch.manual_seed(0)
    return torch.rand(40, 3, 8, 8), torch.rand(40, 3, 8, 8) ** 2


def filled(metric, real, fake):
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric


class TestSets:
    """FID and KID on features that are made once."""

    def test_identity_is_perfect(self, sets):
        features = Network()(sets[0])
        # The distance is a difference of traces, each of which rounds in float64, returned in float32.
        scale = float(features.var(0).sum()) * torch.finfo(torch.float32).eps
        assert 0 <= float(filled(Fid(6), features, features).compute()) <= 100 * scale
        # The unbiased estimate leaves out each image's kernel with itself, so for equal sets it is at most 0.
        assert float(filled(Kid(6), features, features).compute()) <= 0

    def test_is_torchmetrics_own(self, sets):
        network = Network()
        ours = filled(Fid(6), network(sets[0]), network(sets[1])).compute()
        theirs = filled(FrechetInceptionDistance(feature=network, normalize=True), *sets).compute()
        assert float(theirs) > 0.01
        assert torch.equal(ours, theirs)
        ours = filled(Kid(6), network(sets[0]), network(sets[1])).compute()
        theirs = filled(KernelInceptionDistance(feature=network, normalize=True, subset_size=40), *sets).compute()[0]
        assert float(theirs) > 0.01
        assert float(ours) == pytest.approx(float(theirs), rel=1e-5)  # subsets are permutations of one sum in float32

    def test_known_distance(self):
        """Two sets that differ by a shift of 3 in one direction: squared distance 9."""
        torch.manual_seed(0)
        features = torch.randn(500, 4, dtype=torch.float64)
        shifted = features + torch.tensor([3.0, 0, 0, 0])
        assert float(filled(Fid(4), features, shifted).compute()) == pytest.approx(9, rel=1e-5)

    def test_too_few_images_give_a_reason(self, sets):
        features = Network()(sets[0])
        with pytest.raises(TooFew, match=names("7 6")):
            filled(Fid(6), features, features[:6]).compute()
        assert math.isfinite(float(filled(Fid(6), features, features[:7]).compute()))
        with pytest.raises(TooFew, match=names("2 1")):
            filled(Kid(6), features[:1], features).compute()

    def test_subsets_do_not_touch_the_global_generator(self, sets):
        features = Network()(sets[0])
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        filled(Kid(6), features, features).compute()
        assert torch.equal(torch.rand(1), expected)


class TestClip:
    """What looks through CLIP."""

    def test_score_of_the_same_direction_is_perfect(self):
        vector = torch.tensor([3.0, 4.0])
        assert clip_score(vector.expand(5, 2), 2 * vector) == pytest.approx(100)

    def test_score_is_never_negative(self):
        assert clip_score(torch.tensor([[1.0, 0.0]]), torch.tensor([-1.0, 0.0])) == 0

    def test_score_is_torchmetrics_own(self, pooled):
        """torchmetrics' class, given a model and processor as it wants them, on the same vectors."""

        class Model(torch.nn.Module):
            config = None

            def get_image_features(self, pixels):
                return pooled.features(pixels)

            def get_text_features(self, ids, mask):
                return pooled.texts([""] * len(ids))

        def process(text=None, images=None, **options):
            if images is not None:
                return {"pixel_values": torch.stack(images)}
            return {"input_ids": torch.ones(len(text), 1), "attention_mask": torch.ones(len(text), 1)}

        frames = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        theirs = CLIPScore(model_name_or_path=lambda: (Model(), process))(frames, ["a"] * 5)
        assert 10 < float(theirs) < 99.9
        assert clip_score(pooled.images(frames), pooled.texts(["a"])[0]) == pytest.approx(float(theirs), rel=1e-6)

    def test_still_picture_agrees_with_itself(self, pooled):
        frame = torch.rand(1, 3, 8, 8)
        assert frame_agreement(pooled.images(frame.expand(4, 3, 8, 8))) == pytest.approx(1)

    def test_known_agreement(self):
        """Neighbours at right angles, then equal: half."""
        assert frame_agreement(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])) == pytest.approx(0.5)

    def test_one_frame_has_no_neighbour(self):
        with pytest.raises(ValueError, match=names("2")):
            frame_agreement(torch.ones(1, 4))


class TestTemporal:
    """PSNR of differences."""

    def test_identity_is_perfect(self):
        frames = torch.rand(3, 3, 8, 8)
        assert temporal_psnr(frames, frames) == math.inf

    def test_known_value(self):
        """Flicker of ±1/10 around the reference makes differences that err by 2/10: 14 dB."""
        reference = torch.full((4, 3, 8, 8), 0.5)
        flicker = reference + 0.1 * torch.tensor([1.0, -1.0, 1.0, -1.0]).view(4, 1, 1, 1)
        assert temporal_psnr(flicker, reference) == pytest.approx(20 - 20 * math.log10(2), abs=1e-4)

    def test_brightness_does_not_count(self):
        reference = torch.rand(3, 3, 8, 8, dtype=torch.float64) / 2
        assert temporal_psnr(reference + 0.25, reference) > 120  # float32 rounding alone

    def test_one_frame_has_no_motion(self):
        with pytest.raises(ValueError, match=names("2")):
            temporal_psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


class TestNames:
    """What can be asked for."""

    @pytest.mark.parametrize("metric", machinery.known().values())
    def test_each_has_one_way_to_its_value(self, metric):
        assert (metric.score is None) != (metric.collect is None)
        assert metric.about.endswith(".")

    def test_defaults(self, monkeypatch):
        """With the published networks where their packages are; else, and for the embedded model, with its CLIP."""

        def listed(embedded):
            return [
                metric.name if source is None else f"{metric.name}[{source}]" for metric, source in defaults(embedded)
            ]

        defaults = machinery.defaults
        without_network = ["psnr", "ssim", "temporal_psnr"]
        clip = [f"{name}[demo-clip]" for name in ("perceptual", "fid", "kid", "clip_score", "frame_agreement")]
        monkeypatch.setattr(machinery, "installed", lambda packages: True)
        assert listed(embedded=False) == [*without_network, "lpips", "fid", "kid", "clip_score", "frame_agreement"]
        assert listed(embedded=True) == [*without_network, *clip[:3], "prompt_agreement", *clip[3:]]
        monkeypatch.setattr(machinery, "installed", lambda packages: "torchvision" not in packages)
        assert listed(embedded=False) == without_network + clip

    def test_one_file_makes_a_metric(self, tmp_path, monkeypatch):
        """Elsewhere, too: nothing of the package lists it."""
        (tmp_path / "brightness.py").write_text(
            "from dit_accel.eval.metric import Metric\n"
            "METRICS = (Metric(name='brightness', title='Brightness', unit='', better='higher', about='Mean of all.',\n"
            "                order=0, score=lambda sample, network: float(sample.frames.mean())),)\n"
        )
        monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
        monkeypatch.delitem(sys.modules, "dit_accel.eval.metrics.brightness", raising=False)
        (choice,) = choose(["brightness"], embedded=True, frames=1, device=CPU)
        frames = torch.full((1, 3, 4, 4), 0.25)
        assert choice.declared.score(Scored(frames, frames, ""), choice.network) == 0.25
        assert choose([], embedded=True, frames=1, device=CPU)[0].name == "brightness"

    @pytest.mark.parametrize(
        ("chosen", "message"),
        [
            (["pnsr"], "'pnsr' 'psnr'"),
            (["fid[demo-clip"], "'fid[demo-clip' name["),
            (["psnr[demo-clip]"], "psnr network"),
            (["psnr", "psnr"], "psnr"),
            (["clip_score[inception]"], "inception demo-clip"),
            (["lpips[demo-clip]"], "lpips perceptual[demo-clip]"),
            (["fid[none.pth]"], "torch-fidelity"),
        ],
        ids=str,
    )
    def test_refused(self, chosen, message):
        with pytest.raises(DitAccelError) as error:
            choose(chosen, embedded=True, frames=5, device=CPU)
        assert says(str(error.value), message)

    def test_what_reads_the_embedded_model_is_refused_for_others(self):
        with pytest.raises(DitAccelError, match=names("prompt_agreement")):
            choose(["prompt_agreement"], embedded=False, frames=5, device=CPU)

    def test_images_have_no_neighbours(self):
        with pytest.raises(DitAccelError, match=names("temporal_psnr")):
            choose(["temporal_psnr"], embedded=True, frames=1, device=CPU)

    @pytest.mark.parametrize(("metric", "package"), [("fid", "torch_fidelity"), ("lpips", "torchvision")])
    def test_extra_that_is_absent_or_does_not_load(self, metric, package, tmp_path, monkeypatch):
        def refused() -> str:
            with pytest.raises(DitAccelError) as error:
                choose([metric], embedded=False, frames=5, device=CPU)
            return str(error.value)

        if importlib.util.find_spec(package) is None:
            assert says(refused(), "dit_accel[eval-reference]")
        (tmp_path / f"{package}.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, package, raising=False)
        assert "is installed but cannot be loaded (operator torchvision::nms does not exist)" in refused()


def test_a_network_sees_a_frame_once(pooled, monkeypatch):
    calls = []
    monkeypatch.setattr(pooled, "features", lambda frames: calls.append(1) or frames.flatten(1))
    sample = Scored(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), "")
    assert sample.features(pooled) is sample.features(pooled)
    assert calls == [1]
