import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_merge.checkpoints.checkpoint import Checkpoint
from hf_merge.errors import EvaluationError
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.runners.images import load_image_processor
from hf_merge.model_ref import ModelRef

TASK = {"name": "o", "task": "image-classification", "input": "image"}
LABELS = ("pos", "neg", "who", "where", "when")


@pytest.fixture
def processor():
    return ViTImageProcessorPil(size={"height": 16, "width": 16})


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (20, 12, 3)).astype(np.uint8)) for _ in range(40)]
    every = Dataset.from_dict({"image": images, "label": [LABELS[i] for i in rng.integers(0, 5, 40)]})
    return DatasetDict({"search": every.select(range(20)), "held_out": every.select(range(20, 40))})


@pytest.mark.parametrize("batch_size", [1, 7])
def test_the_class_of_each_image_is_that_of_a_plain_loop(make_model, evaluator, processor, pictures, batch_size):
    model, right = make_model("vit"), []
    for row in pictures["search"]:
        with torch.inference_mode():
            logits = model(**processor(images=[row["image"]], return_tensors="pt")).logits
        right.append(LABELS[int(logits.argmax())] == row["label"])
    assert 0 < sum(right) < len(right)
    objective = Objective(dataset=pictures, batch_size=batch_size, **TASK)
    score = evaluator(model, objective, processor=processor, tokenizer=None).measure(model)["o"]
    assert score.outcomes.tolist() == right


def test_a_model_in_half_precision_gets_images_in_half_precision(make_model, evaluator, processor, pictures):
    model, seen = make_model("vit").to(torch.bfloat16), set()
    model.register_forward_pre_hook(lambda module, args, inputs: seen.add(inputs["pixel_values"].dtype), with_kwargs=True)
    evaluator(model, Objective(dataset=pictures, **TASK), processor=processor).measure(model)
    assert seen == {torch.bfloat16}


def test_gray_images_are_taken_as_colored_ones(make_model, evaluator, processor, pictures):
    model = make_model("vit")
    gray = pictures.map(lambda row: {"image": row["image"].convert("L")})
    assert evaluator(model, Objective(dataset=gray, **TASK), processor=processor).measure(model)["o"].examples == 20


def test_an_image_in_both_splits_is_refused(make_model, evaluator, processor, pictures):
    data = DatasetDict({"search": pictures["search"], "held_out": pictures["search"].select([3])})
    with pytest.raises(EvaluationError, match="1 inputs stand both"):
        evaluator(make_model("vit"), Objective(dataset=data, **TASK), processor=processor)


def test_images_need_a_processor(make_model, evaluator, pictures):
    with pytest.raises(EvaluationError, match="give it as `processor`"):
        evaluator(make_model("vit"), Objective(dataset=pictures, **TASK))


def test_a_column_without_images_is_refused(make_model, evaluator, processor, make_data):
    with pytest.raises(EvaluationError, match=r"expected an image \(a column with the feature"):
        evaluator(make_model("vit"), Objective(dataset=make_data(), **{**TASK, "input": "text"}), processor=processor)


def test_a_processor_that_leaves_sizes_as_they_are_is_told(make_model, evaluator, pictures):
    sizes = [Image.fromarray(np.full((8 + i, 8, 3), i, dtype=np.uint8)) for i in range(4)]
    other = Dataset.from_dict({"image": sizes, "label": ["pos"] * 4})
    data = DatasetDict({"search": pictures["search"], "held_out": other})
    with pytest.raises(EvaluationError, match="bring all images to one size"):
        evaluator(make_model("vit"), Objective(dataset=data, **TASK), processor=ViTImageProcessorPil(do_resize=False))


def test_a_fingerprint_changes_with_a_pixel(make_model, evaluator, processor, pictures):
    model = make_model("vit")
    rows = list(pictures["search"])
    rows[0]["image"].putpixel((0, 0), (1, 2, 3))
    changed = DatasetDict({**pictures, "search": Dataset.from_list(rows).cast(pictures["search"].features)})
    one, two = (
        evaluator(model, Objective(dataset=data, **TASK), processor=processor).fingerprint for data in (pictures, changed)
    )
    assert one != two


def test_a_checkpoints_image_processor_is_loaded(make_model, processor, tmp_path):
    make_model("vit").save_pretrained(tmp_path)
    assert load_image_processor(Checkpoint(ModelRef.parse(str(tmp_path)))) is None
    processor.save_pretrained(tmp_path)
    loaded = load_image_processor(Checkpoint(ModelRef.parse(str(tmp_path))))
    assert loaded.to_dict() == processor.to_dict()


def test_an_image_processor_that_is_not_known_is_told(make_model, tmp_path):
    make_model("vit").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    (tmp_path / "config.json").write_text('{"model_type": "unheard"}')
    with pytest.raises(EvaluationError, match="its image processor cannot be loaded"):
        load_image_processor(Checkpoint(ModelRef.parse(str(tmp_path))))
