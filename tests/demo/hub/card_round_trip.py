"""Run by test_hub_libraries.py in a process whose environment points at a local Hub: a card there and back."""

from huggingface_hub import HfApi, ModelCard, ModelCardData, metadata_update

if __name__ == "__main__":
    HfApi().create_repo("demo/card")
    ModelCard(f"---\n{ModelCardData(license='mit').to_yaml()}\n---\n# Card").push_to_hub("demo/card")
    metadata_update("demo/card", {"tags": ["merge"]})
    assert ModelCard.load("demo/card").data.tags == ["merge"]
    assert [model.id for model in HfApi().list_models(filter="merge")] == ["demo/card"]
