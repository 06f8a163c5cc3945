"""The pipeline: against stock FLUX without references, groups, seeds, callbacks, loading, and the messages of bad input."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mosaic.images import PreparedReference, prepare_reference
from mosaic.lora.adapter import attach_reference_lora, reference_lora_parameters
from mosaic.method.grids import Grid
from mosaic.method.tokens import pack_latents, position_ids, reference_position_ids, unpack_latents
from mosaic.pipeline.attention_report import subject_tokens
from mosaic.pipeline.latents import decode_latents, encode_images, images_to_tensor
from mosaic.pipeline.pipeline import MosaicFluxPipeline, MosaicPipelineOutput
from tests import naive, tiny
from tests.tiny import CALL, GRID, HEIGHT, SIZE, WIDTH, noise, run


@pytest.fixture(scope="module")
def shared() -> MosaicFluxPipeline:
    """One pipeline for the tests that do not change it."""
    return tiny.build_pipeline()


# ---- oracles


@pytest.mark.parametrize("num_images_per_prompt", [1, 2])
def test_without_references_equals_flux_pipeline(guidance_embeds: bool, num_images_per_prompt: int) -> None:
    prompts, start = ["a cat and two mugs", "a fish on the beach"], noise(2 * num_images_per_prompt)
    common = {
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": 3,
        "guidance_scale": 2.5,
        "num_images_per_prompt": num_images_per_prompt,
    }
    stock = tiny.build_stock_pipeline(guidance_embeds)
    want = stock(prompts, latents=start.clone(), max_sequence_length=tiny.TEXT_LENGTH, output_type="latent", **common).images
    ours = tiny.build_pipeline(guidance_embeds, lora_rank=None)
    torch.testing.assert_close(ours(prompts, latents=start, output_type="latent", **common).images, want, atol=1e-5, rtol=1e-5)
    attach_reference_lora(ours.transformer, 2)
    pixels = stock(prompts, latents=start.clone(), max_sequence_length=tiny.TEXT_LENGTH, output_type="np", **common).images
    np.testing.assert_allclose(ours(prompts, latents=start, output_type="np", **common).images, pixels, atol=1e-4)


def test_start_noise_of_a_seed_equals_flux_pipeline() -> None:
    arguments = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 1, "output_type": "latent"}
    stock = tiny.build_stock_pipeline()(
        "a cat", generator=torch.Generator().manual_seed(42), max_sequence_length=tiny.TEXT_LENGTH, **arguments
    ).images
    ours = tiny.build_pipeline(lora_rank=None)("a cat", generator=torch.Generator().manual_seed(42), **arguments).images
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("mode", "image_guidance"), [("target", 1.0), ("isolated", 1.0), ("joint", 1.0), ("target", 2.5), ("joint", 0.0)])
def test_sampling_equals_a_plain_euler_loop_of_the_naive_twin(mode: str, image_guidance: float) -> None:
    pipeline, stock = tiny.build_pipeline(), tiny.build_stock_pipeline()
    pictures, start, steps, guidance = [tiny.picture(1), tiny.picture(2)], noise(1), 3, 2.0
    found = run(
        pipeline,
        prompt="a cat",
        reference_images=pictures,
        latents=start,
        num_inference_steps=steps,
        guidance_scale=guidance,
        image_guidance_scale=image_guidance,
        reference_attention=mode,
    )

    lora = {key: parameter.detach() for key, parameter in reference_lora_parameters(pipeline.transformer).items()}
    twin = naive.NaiveFlux(stock.transformer, naive.lora_matrices(lora))
    with torch.no_grad():
        embeds, pooled, _ = stock.encode_prompt("a cat", None, max_sequence_length=tiny.TEXT_LENGTH)
        prepared = images_to_tensor([prepare_reference(picture, SIZE) for picture in pictures])
        mean = stock.vae.encode(prepared).latent_dist.mode()
        references = pack_latents((mean - 0.1) * 0.5)[None]  # shift and scale of the tiny VAE
        mu = 0.5 + (1.15 - 0.5) * (GRID.num_tokens - 256) / (4096 - 256)
        sigmas = [1 / (1 + np.exp(-mu) * (steps / k - 1)) for k in range(steps, 0, -1)] + [0.0]
        latents = start
        for now, then in itertools.pairwise(sigmas):
            without, velocity = (
                twin(
                    hidden_states=latents,
                    encoder_hidden_states=embeds,
                    pooled_projections=pooled,
                    timestep=torch.tensor([now], dtype=torch.float32),
                    guidance=torch.tensor([guidance]),
                    img_ids=position_ids(GRID),
                    txt_ids=torch.zeros(tiny.TEXT_LENGTH, 3),
                    reference_hidden_states=share * references,
                    reference_ids=reference_position_ids(Grid(3, 3), 2),
                    reference_attention=mode,
                ).velocity
                for share in (0, 1)
            )
            latents = latents + (then - now) * (image_guidance * velocity + (1 - image_guidance) * without)
    torch.testing.assert_close(found, latents, atol=2e-4, rtol=1e-3)


# ---- prompts, groups, seeds


def test_prompts_with_different_k_equal_single_calls(shared: MosaicFluxPipeline) -> None:
    prompts = ["a cat", "two mugs", "a fish", "the beach"]
    references = [[tiny.picture(1), tiny.picture(2)], [], [tiny.picture(3)], [tiny.picture(4), tiny.picture(5)]]
    start = noise(4)
    together = run(shared, prompt=prompts, reference_images=references, latents=start)
    alone = [
        run(shared, prompt=p, reference_images=r, latents=start[i : i + 1])
        for i, (p, r) in enumerate(zip(prompts, references, strict=True))
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(
        together[0], run(shared, prompt=["a cat"], reference_images=[references[0][::-1]], latents=start[:1])[0], atol=1e-3
    )


def test_references_that_are_prepared_already_change_nothing(shared: MosaicFluxPipeline) -> None:
    pictures, start = [tiny.picture(1), tiny.picture(2)], noise(1)
    prepared = [PreparedReference.make(picture, SIZE) for picture in pictures]
    found = [
        run(shared, prompt="a cat", reference_images=given, latents=start) for given in (pictures, prepared, [pictures[0], prepared[1]])
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_several_pictures_per_prompt(shared: MosaicFluxPipeline) -> None:
    references = [[tiny.picture(1)], [tiny.picture(2), tiny.picture(3)]]
    start = noise(4)
    found = run(shared, prompt=["a cat", "two mugs"], reference_images=references, latents=start, num_images_per_prompt=2)
    for index, prompt in enumerate(["a cat", "two mugs"]):
        for i in range(2):
            row = 2 * index + i
            alone = run(shared, prompt=prompt, reference_images=references[index], latents=start[row : row + 1])
            torch.testing.assert_close(found[row], alone[0], atol=1e-5, rtol=1e-5)


def test_generators(shared: MosaicFluxPipeline) -> None:
    def seeds(*numbers: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in numbers]

    common = {"prompt": ["a cat", "a cat"], "reference_images": [[tiny.picture(1)]] * 2}
    both = run(shared, **common, generator=seeds(7, 8))
    swapped = run(shared, **common, generator=seeds(8, 7))
    torch.testing.assert_close(both, swapped.flip(0), atol=1e-5, rtol=1e-5)
    single = run(shared, prompt="a cat", reference_images=[tiny.picture(1)], generator=seeds(8)[0])
    torch.testing.assert_close(both[1:], single, atol=1e-5, rtol=1e-5)
    assert torch.equal(run(shared, **common, generator=seeds(7)[0]), run(shared, **common, generator=seeds(7)[0]))
    assert not torch.allclose(both[0], both[1], atol=1e-2)


def test_embeddings_and_reference_latents_equal_prompt_and_pictures(shared: MosaicFluxPipeline) -> None:
    pictures, start = [tiny.picture(1), tiny.picture(2)], noise(1)
    want = run(shared, prompt="a cat", reference_images=pictures, latents=start)
    with torch.no_grad():
        embeds, pooled, _ = shared.encode_prompt("a cat", None, max_sequence_length=tiny.TEXT_LENGTH)
        latents = encode_images(shared.vae, images_to_tensor([prepare_reference(picture, SIZE) for picture in pictures]))
    common = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "latents": start}
    for given in (latents, [latents], latents[None]):
        torch.testing.assert_close(run(shared, **common, reference_latents=given), want, atol=1e-5, rtol=1e-5)
    bare = run(shared, **common)
    for nothing in ([None], [latents[:0]]):
        assert torch.equal(run(shared, **common, reference_latents=nothing), bare)
    assert not torch.allclose(bare, want, atol=1e-3)


def test_settings_matter(shared: MosaicFluxPipeline) -> None:
    common = {"prompt": "a cat", "reference_images": [tiny.picture(1)], "latents": noise(1)}
    want = run(shared, **common)
    changes = {"reference_scale": 0.5, "reference_size": 16, "reference_attention": "isolated", "guidance_scale": 1.0}
    for name, value in (changes | {"reference_position": "index", "max_sequence_length": 4}).items():
        assert not torch.allclose(run(shared, **common, **{name: value}), want, atol=1e-4), name
    defaults = {"reference_attention": "target", "reference_position": "width", "reference_scale": 0.9, "guidance_scale": 3.5}
    defaults |= {"max_sequence_length": tiny.TEXT_LENGTH}
    assert torch.equal(run(shared, **common, **defaults), want)


# ---- outputs, callbacks


def test_output_types(shared: MosaicFluxPipeline) -> None:
    common = CALL | {"prompt": ["a cat", "two mugs"], "reference_images": [[tiny.picture(1)], []], "latents": noise(2)}
    outputs = {kind: shared(**common | {"output_type": kind}) for kind in ("pil", "np", "pt", "latent")}
    assert all(isinstance(output, MosaicPipelineOutput) and output.attention is None for output in outputs.values())
    assert [(image.size, image.mode) for image in outputs["pil"].images] == [((WIDTH, HEIGHT), "RGB")] * 2
    assert outputs["np"].images.shape == (2, HEIGHT, WIDTH, 3)
    assert outputs["pt"].images.shape == (2, 3, HEIGHT, WIDTH)
    assert outputs["latent"].images.shape == (2, GRID.num_tokens, tiny.CHANNELS)
    assert np.array_equal(np.asarray(outputs["pil"].images[1]), (outputs["np"].images[1] * 255).round().astype("uint8"))
    decoded = decode_latents(shared.vae, unpack_latents(outputs["latent"].images, GRID)).detach()
    torch.testing.assert_close(outputs["pt"].images, (decoded / 2 + 0.5).clamp(0, 1))


def test_attention_maps(shared: MosaicFluxPipeline) -> None:
    prompts, references = ["a cat", "two mugs", "a fish"], [[tiny.picture(1)], [], [tiny.picture(2), tiny.picture(3)]]
    common = CALL | {"prompt": prompts, "reference_images": references, "latents": noise(3)}
    output, plain = shared(**common, output_attention=True), shared(**common)
    torch.testing.assert_close(output.images, plain.images)
    assert output.attention[1] is None
    for found, count in ((output.attention[0], 1), (output.attention[2], 2)):
        assert found.maps.shape == (count, 9, GRID.num_tokens)
        assert found.maps.dtype == found.entropy.dtype == torch.float32
        torch.testing.assert_close(found.maps.sum(-1), torch.ones(count, 9))
        assert found.entropy.shape == (2, count)
        assert (found.reference_grid, found.target_grid) == ((3, 3), GRID)
    one = shared(**CALL | {"prompt": "a fish", "reference_images": references[2], "latents": noise(3)[2:]}, output_attention=True)
    for name in ("maps", "entropy", "subject"):
        torch.testing.assert_close(getattr(one.attention[0], name), getattr(output.attention[2], name), atol=1e-5, rtol=1e-4)


def test_attention_over_the_steps_and_over_the_subjects(shared: MosaicFluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, forward = [], shared.transformer.forward

    def keep(*arguments: object, **more: object) -> object:
        output = forward(*arguments, **more)
        rows.append(output.attention_rows.clone())
        return output

    monkeypatch.setattr(shared.transformer, "forward", keep)
    pictures = [tiny.picture(2), tiny.picture(3)]
    common = CALL | {"prompt": "a fish", "latents": noise(1), "num_inference_steps": 3}
    found = shared(**common, reference_images=pictures, output_attention=True).attention[0]
    torch.testing.assert_close(found.maps.flatten(0, 1), torch.stack(rows).mean(dim=(0, 1)))
    for k, picture in enumerate(pictures):
        assert torch.equal(found.subject[k], subject_tokens(prepare_reference(picture, 12), Grid(3, 3)))
        for step, one in enumerate(rows):
            row_entropies = [-sum(p * math.log(p) for p in row.tolist() if p) for row in one[0, k * 9 : k * 9 + 9][found.subject[k]]]
            assert float(found.entropy[step, k]) == pytest.approx(sum(row_entropies) / len(row_entropies), rel=1e-4)
    latents = torch.randn(2, tiny.CHANNELS // 4, 6, 6, generator=torch.Generator().manual_seed(1))
    assert shared(**common, reference_latents=[latents], output_attention=True).attention[0].subject.all()


def test_a_sampler_that_is_stopped_has_the_attention_of_its_steps(shared: MosaicFluxPipeline) -> None:
    def stop(pipeline: MosaicFluxPipeline, *_: object) -> dict:
        pipeline._interrupt = True
        return {}

    prompts, references = ["a cat", "a fish"], [[tiny.picture(1)], [tiny.picture(2), tiny.picture(3)]]
    common = CALL | {"prompt": prompts, "reference_images": references, "latents": noise(2), "num_inference_steps": 3}
    first, second = shared(**common, output_attention=True, callback_on_step_end=stop).attention
    torch.testing.assert_close(first.maps.sum(-1), torch.ones(1, 9))
    assert len(first.entropy) == 1
    assert second is None


def test_the_callback_sees_and_changes_the_latents(shared: MosaicFluxPipeline) -> None:
    seen = []

    def callback(pipeline: MosaicFluxPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((pipeline, step, float(timestep), sorted(tensors), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    common = {"prompt": "a cat", "reference_images": [tiny.picture(1)], "latents": noise(1), "callback_on_step_end": callback}
    result = run(shared, **common, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert not result.any()
    assert [(p is shared, step, names) for p, step, _, names, _ in seen] == [
        (True, 0, ["latents", "prompt_embeds"]),
        (True, 1, ["latents", "prompt_embeds"]),
    ]
    assert seen[0][2] == 1000 > seen[1][2] > 0
    assert seen[0][4] == (1, GRID.num_tokens, tiny.CHANNELS)


def test_interrupt_stops_the_sampler(shared: MosaicFluxPipeline) -> None:
    steps = []

    def callback(pipeline: MosaicFluxPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(step)
        pipeline._interrupt = step == 0
        return tensors

    run(shared, prompt="a cat", callback_on_step_end=callback, num_inference_steps=4)
    assert steps == [0]
    steps.clear()
    run(shared, prompt="a cat", callback_on_step_end=None)
    assert shared.num_timesteps == 2


# ---- latents


def test_images_and_latents_round_trip(shared: MosaicFluxPipeline) -> None:
    pictures = [Image.new("RGB", (8, 4), (255, 0, 51)), Image.new("RGB", (8, 4), (0, 0, 0))]
    tensor = images_to_tensor(pictures)
    assert tensor.shape == (2, 3, 4, 8)
    assert tensor[0, :, 0, 0].tolist() == pytest.approx([1, -1, -0.6])
    with pytest.raises(ValueError, match=r"one size, got \(width, height\) \[\(4, 4\), \(8, 4\)\]"):
        images_to_tensor([pictures[0], Image.new("RGB", (4, 4))])
    with torch.no_grad():
        mode = shared.vae.encode(tensor).latent_dist.mode()
        latents = encode_images(shared.vae, tensor)
        torch.testing.assert_close(latents, (mode - 0.1) * 0.5)
        torch.testing.assert_close(decode_latents(shared.vae, latents), shared.vae.decode(mode).sample, atol=1e-4, rtol=1e-4)
        drawn = [encode_images(shared.vae, tensor, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
