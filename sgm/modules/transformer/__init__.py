"""Parts of the diffusion transformer: mixins for SwissArmyTransformer's BaseModel, and layers."""
