"""Looks for a recipe: bits for every matrix that meet a target and cost the model least."""

from decoct.search.find import Found, find_bits
from decoct.search.plan import SearchPlan, plan_search
from decoct.search.settings import Search

__all__ = ["Found", "Search", "SearchPlan", "find_bits", "plan_search"]
