from .order import EvalLoader, Order, Share, TrainLoader, generator

__all__ = ["EvalLoader", "Order", "Share", "TrainLoader", "generator"]
