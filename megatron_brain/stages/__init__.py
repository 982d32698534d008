"""The stages of post-training. Each is a folder: `spec.py` describes the stage without torch, `stage.py` runs it."""

from megatron_brain.config.stage_spec import register_stage
from megatron_brain.stages.brain.spec import BRAIN
from megatron_brain.stages.evaluate.spec import EVALUATE
from megatron_brain.stages.generate.spec import GENERATE
from megatron_brain.stages.reward.spec import REWARD
from megatron_brain.stages.sft.spec import SFT

for _spec in (SFT, REWARD, BRAIN, GENERATE, EVALUATE):
    register_stage(_spec)
