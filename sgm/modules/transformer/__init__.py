"""The parts of the diffusion transformer, each a mixin for SwissArmyTransformer's BaseModel."""
