// Checks of what the planner is given, and the row counts that follow from it. After it nothing can be out of range.
#pragma once

#include "planner/plan.h"

namespace megabagel::planner {

// Row counts of the plan. Throws std::invalid_argument when pieces contradict themselves or each other.
Sizes check_and_count(const Input& input);

}  // namespace megabagel::planner
