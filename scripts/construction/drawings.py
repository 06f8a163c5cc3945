"""Candidates whose pictures are drawings of the pocket world, so that what stages 3 to 5 make of them can be held against the truth."""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from preprocess.construct.candidates import picture_name
from preprocess.construct.chunks import Chunks, Stored, as_json
from preprocess.construct.config import ConstructConfig
from preprocess.construct.prompts.templates import read_templates
from preprocess.construct.rows import PromptRow, Subject, SynthesisRow
from preprocess.construct.run import WORK, stages_of
from preprocess.construct.synthesis.criteria import load_criteria
from scripts.pocket import world
from scripts.pocket.model import SCENE_PIXELS

FIRST_SEED = 600_000_000  # scenes of these candidates; far from the seeds of data sets and of the evaluation
"""Scenes are of the training split: what is judged later are individuals that no data set has."""


def scene_of(number: int, config: ConstructConfig) -> world.Scene:
    """The scene of a candidate, of as many subjects as the config draws."""
    shares = np.array(config.prompts.num_subjects)
    count = 1 + int(np.random.default_rng(number).choice(len(shares), p=shares / shares.sum()))
    return world.sample_scene(FIRST_SEED + number, "train", count)


def draw_candidates(config: ConstructConfig, output: Path, count: int) -> None:
    """Write stages 1 and 2 of at least `count` candidates into a folder of the construction; chunks that are there are left alone."""
    prompts, synthesis = stages_of(config)[:2]
    chunks = Chunks(output / WORK, config.chunk_size)
    kinds = {subject.name: subject.kind for subject in read_templates(config.prompts.templates).subjects}
    criteria = load_criteria(config.synthesis, torch.device("cpu"), torch.float32)
    for chunk in tqdm(range(-(-count // config.chunk_size)), desc="drawing candidates", unit="chunk"):
        rows = chunks.read(synthesis, chunk)
        if len(rows) == config.chunk_size:
            continue
        scenes = {number: scene_of(number, config) for number in chunks.numbers(chunk)}
        with chunks.adding(prompts, chunk, {}) as (_, added):
            for number, scene in scenes.items():
                names = [placement.identity.class_name for placement in scene.placements]
                subjects = tuple(Subject(phrase=f"a {name}", name=name, kind=kinds[name]) for name in names)
                text = world.caption(scene)
                added.append(Stored(PromptRow(number=number, prompt=text, caption=text, subjects=subjects, seed=scene.seed), None))
        candidates = {candidate.number: candidate for candidate in chunks.candidates([prompts], chunk)}
        with chunks.adding(synthesis, chunk, {}) as (folder, added):
            for number, scene in scenes.items():
                picture = world.render_scene(scene, SCENE_PIXELS).image
                picture.save(folder / picture_name(number))
                scores = {criterion.name: criterion.score(picture, candidates[number])[0] for criterion in criteria}
                row = SynthesisRow(number=number, seed=scene.seed, height=SCENE_PIXELS, width=SCENE_PIXELS, scores=scores)
                added.append(Stored(row, as_json(synthesis.inputs(candidates[number]))))
