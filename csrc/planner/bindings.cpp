// megabagel.ops._planner: the planner's functions for numpy arrays. The arrays of a plan lie on the planner's memory.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "planner/binpack.h"
#include "planner/plan.h"

namespace py = pybind11;
using namespace megabagel::planner;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

constexpr size_t kNumFields = sizeof(Piece) / sizeof(int64_t);  // a piece is a row of the table that Python passes

template <typename T>
py::array_t<T> to_numpy(Column<T>& column) {
  T* data = column.data.release();
  py::capsule owner(data, [](void* memory) { delete[] static_cast<T*>(memory); });
  std::vector<py::ssize_t> shape{static_cast<py::ssize_t>(column.size / column.width)};
  if (column.width > 1) shape.push_back(static_cast<py::ssize_t>(column.width));
  return py::array_t<T>(shape, data, owner);
}

py::tuple plan_arrays(const Array<int64_t>& pieces, const Array<float>& timesteps, const Array<int64_t>& text_ids,
                      const Array<int64_t>& sample_lens, const Array<int64_t>& buckets,
                      const std::array<int64_t, 6>& geometry, int64_t tile, std::optional<int64_t> total_length) {
  if (pieces.ndim() != 2 || pieces.shape(1) != static_cast<py::ssize_t>(kNumFields)) {
    throw std::invalid_argument("pieces must be a table of " + std::to_string(kNumFields) + " columns");
  }
  if (timesteps.ndim() != 1 || text_ids.ndim() != 1 || sample_lens.ndim() != 1 || buckets.ndim() != 1) {
    throw std::invalid_argument("timesteps, text_ids, sample_lens and buckets must have one dimension");
  }
  if (timesteps.size() != pieces.shape(0)) {
    throw std::invalid_argument("every piece needs a timestep: " + std::to_string(timesteps.size()) +
                                " are given for " + std::to_string(pieces.shape(0)) + " pieces");
  }
  const Input input{reinterpret_cast<const Piece*>(pieces.data()), pieces.shape(0), timesteps.data(),
                    text_ids.data(), text_ids.size(), sample_lens.data(), sample_lens.size(),
                    buckets.data(), buckets.size()};
  const Geometry sides{geometry[0], geometry[1], geometry[2], geometry[3], geometry[4], geometry[5]};
  std::optional<Plan> plan;
  {
    py::gil_scoped_release release;
    plan.emplace(build_plan(input, sides, tile, total_length));
  }
  py::dict arrays;
  for_each_column(*plan, [&](const char* name, auto& column) { arrays[name] = to_numpy(column); });
  return py::make_tuple(plan->und_length, plan->gen_length, arrays);
}

Strategy strategy_of(const std::string& name) {
  if (name == "greedy") return Strategy::kGreedy;
  if (name == "best_fit") return Strategy::kBestFit;
  throw std::invalid_argument("the packing strategy is '" + name + "', but must be 'greedy' or 'best_fit'");
}

Limits limits_of(const std::array<int64_t, 4>& limits) { return {limits[0], limits[1], limits[2], limits[3]}; }

int64_t decide_one(const std::string& strategy, const std::array<int64_t, 4>& limits, int64_t fill,
                   const std::vector<int64_t>& waiting) {
  return decide(strategy_of(strategy), limits_of(limits), fill, waiting);
}

std::vector<int64_t> pack_all(const std::string& strategy, const std::array<int64_t, 4>& limits,
                              const std::vector<int64_t>& lengths, const std::vector<int64_t>& groups,
                              const std::vector<int64_t>& mandatory) {
  py::gil_scoped_release release;
  return pack_sequence(strategy_of(strategy), limits_of(limits), lengths, groups, mandatory);
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
  m.doc() = "The packing planner; megabagel/packing/native.py is its only caller.";
  m.def("build_plan", &plan_arrays, py::arg("pieces").noconvert(), py::arg("timesteps").noconvert(),
        py::arg("text_ids").noconvert(), py::arg("sample_lens").noconvert(), py::arg("buckets").noconvert(),
        py::arg("geometry"), py::arg("tile"), py::arg("total_length"),
        "und_length, gen_length and every array of a PackPlan but sample_lens and image_keys. pieces [P, 12] (struct "
        "Piece) and the other arrays int64, timesteps [P] float32, all contiguous; geometry: bos, eos, start and end "
        "of image, sides of the ViT and the latent position table. Raises ValueError.");
  m.def("decide", &decide_one, py::arg("strategy"), py::arg("limits"), py::arg("fill"), py::arg("waiting"),
        "Index of the waiting sample to take, -1 (draw) or -2 (close); limits: expected_num_tokens, max_num_tokens, "
        "prefer_buffer_before, max_buffer_size.");
  m.def("pack_sequence", &pack_all, py::arg("strategy"), py::arg("limits"), py::arg("lengths"), py::arg("groups"),
        py::arg("mandatory"), "The pack number of each sample of a known sequence.");
}
