"""A reward for a language model that is trained by policy gradient: NewReward.

lightning fit --config reinforce/quick_base
lightning fit --config reinforce/quick --model.rewards=new_reward.NewReward

The first command trains the base model, the second one the policy. With += instead of = the reward
is added to those of the config.
"""

from ravine.lightning_modules import Reward
from ravine.lightning_modules.rl.rewards.base import RewardInputs


class NewReward(Reward):
    """Fraction of the lines of a text that end in a punctuation mark.

    Args:
        marks: the characters that count as punctuation marks.
        weight: weight of this reward in the sum of all rewards.
        name: name of the metric; by default that of the class in snake case.
    """

    def __init__(self, marks: str = ".,:;!?", weight: float = 1.0, name: str | None = None) -> None:
        """Store the arguments."""
        super().__init__(weight, name)
        self.marks = marks

    def score(self, inputs: RewardInputs) -> list[float | None]:
        """Return a number for each text, or None for a text that cannot be scored."""
        return [self.score_text(text) for text in inputs.texts]

    def score_text(self, text: str) -> float | None:
        """Return the fraction of lines; None for a text without lines."""
        lines = [line for line in text.splitlines() if line.strip()]
        if not lines:
            return None
        return sum(line.rstrip()[-1] in self.marks for line in lines) / len(lines)
