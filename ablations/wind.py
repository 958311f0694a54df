"""LunarLander with wind and turbulence, whose phases the observation does not show: --env-id ablations.wind:LunarLanderWind-v3"""

import gymnasium

gymnasium.register(
    "LunarLanderWind-v3", "gymnasium.envs.box2d:LunarLander", kwargs=dict(enable_wind=True), max_episode_steps=1000, reward_threshold=200
)
