"""Recipes: a whole compression in one YAML file, and back from the model that it made.

result = tfcompress.Recipe.load("recipe.yaml").apply(model, data, output="out")
result.model, result.artefacts, result.metrics
tfcompress.Recipe.from_model("out/model.tflite").to_yaml()
"""

from tfcompress.recipe.document import RecipeError
from tfcompress.recipe.models import ModelFileError, load_model, save_model
from tfcompress.recipe.recipe import Budget, Recipe, Stage
from tfcompress.recipe.run import Result

__all__ = [
    "Budget",
    "ModelFileError",
    "Recipe",
    "RecipeError",
    "Result",
    "Stage",
    "load_model",
    "save_model",
]
