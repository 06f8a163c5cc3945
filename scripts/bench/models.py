"""The models that `bench.py score` measures with, as its flags name them."""

import argparse
import os
from collections.abc import Sequence

import torch

from mosaic.evaluation import judging
from mosaic.evaluation.aesthetics import AestheticMeasure, SiglipAesthetic
from mosaic.evaluation.answering import load_answerer
from mosaic.evaluation.arcface import ArcFace
from mosaic.evaluation.chat import EndpointChat, LocalChat
from mosaic.evaluation.collapse import Collapse
from mosaic.evaluation.detection import load_detector
from mosaic.evaluation.dpg import DpgScore
from mosaic.evaluation.encoders import ClipEncoder, DinoEncoder, Dinov2Encoder
from mosaic.evaluation.entries import Entry
from mosaic.evaluation.faces import RetinaFace
from mosaic.evaluation.id_sim import FaceSimilarity
from mosaic.evaluation.instances import InstanceFinder
from mosaic.evaluation.ip_sim import InstanceSimilarity
from mosaic.evaluation.measures import ClipSimilarity, Measure, ReferenceSimilarity
from mosaic.evaluation.segmentation import Sam2Segmenter

DINOV2 = "facebook/dinov2-base"  # of --collapse
JUDGE_KEY = "JUDGE_API_KEY"  # of the environment: where a key of --judge-url may stand

#: What a metric needs that has no default: its flag, and what it is and where it is to be had.
FILES = {
    "id_sim": ("arcface", "model_ir_se50.pth of github.com/TreB1eN/InsightFace_Pytorch"),
    "aes": ("aesthetic", "aesthetic_predictor_v2_5.pth of github.com/discus0434/aesthetic-predictor-v2-5 (AGPL-3.0)"),
}


def needed_metrics(metrics: Sequence[str], entries: Sequence[Entry]) -> set[str]:
    """The metrics of which pictures have any value: without humans no ID-Sim, with humans alone no IP-Sim."""
    kinds = {subject.kind for entry in entries for subject in entry.subjects}
    return set(metrics) - ({"id_sim"} if "human" not in kinds else set()) - ({"ip_sim"} if kinds <= {"human"} else set())


def require_files(arguments: argparse.Namespace, metrics: Sequence[str], entries: Sequence[Entry]) -> None:
    """Check that the files are named which have no default; nothing is read.

    Raises:
        ValueError: One is not.
    """
    needed = needed_metrics(metrics, entries)
    missing = [
        f"{metric} needs --{flag}: {what}" for metric, (flag, what) in FILES.items() if metric in needed and not getattr(arguments, flag)
    ]
    if missing:
        others = " ".join(metric for metric in metrics if metric not in FILES)
        raise ValueError(f"{'; '.join(missing)}. Name the files, or measure without them: --metrics {others}.")


def build_measures(
    arguments: argparse.Namespace, metrics: Sequence[str], entries: Sequence[Entry], device: torch.device | str
) -> list[Measure]:
    """What measures the metrics; models that no picture needs are not loaded.

    Raises:
        FileNotFoundError, ValueError: A package is missing, or a model cannot be loaded.
    """
    needed = needed_metrics(metrics, entries)
    measures: list[Measure] = []
    # The likeliest to lack something come first.
    if "id_sim" in needed:
        measures.append(FaceSimilarity(RetinaFace(device), ArcFace(arguments.arcface, "--arcface", device)))
    if "aes" in needed:
        measures.append(AestheticMeasure(SiglipAesthetic(arguments.siglip, arguments.aesthetic, device)))
    if {"clip_i", "clip_t"} & needed:
        measures.append(ClipSimilarity(ClipEncoder(arguments.clip, "--clip", device)))
    if "dino" in needed:
        measures.append(ReferenceSimilarity("dino", DinoEncoder(arguments.dino, "--dino", device)))
    if "dpg" in needed:
        measures.append(DpgScore(load_answerer(arguments.vqa, "--vqa", device)))
    if "ip_sim" in needed or arguments.collapse:
        finder = InstanceFinder(
            load_detector(arguments.detector, "--detector", device), Sam2Segmenter(arguments.segmenter, "--segmenter", device)
        )
    if "ip_sim" in needed:
        measures.append(InstanceSimilarity("ip_sim", DinoEncoder(arguments.dino, "--dino", device), finder))
        if arguments.dinov2:
            measures.append(InstanceSimilarity("ip_sim_dinov2", Dinov2Encoder(arguments.dinov2, "--dinov2", device), finder))
    if arguments.collapse:
        measures.append(Collapse(Dinov2Encoder(arguments.dinov2 or DINOV2, "--dinov2", device), finder))
    if arguments.judge_url:
        measures.append(judging.Judge(EndpointChat(arguments.judge_url, arguments.judge, os.environ.get(JUDGE_KEY))))
    elif arguments.judge:
        measures.append(judging.Judge(LocalChat(arguments.judge, "--judge", device)))
    return measures
