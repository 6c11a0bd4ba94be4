// Reading a problem's fields from the dictionary that a Python test gives: addresses and numbers by name.
#pragma once

#include <pybind11/pybind11.h>

#include "problem.h"

namespace tikmix_fast::gpu {

template <class T>
T* address(const pybind11::dict& given, const char* name) {
    return reinterpret_cast<T*>(given[name].cast<uintptr_t>());
}
inline int64_t number(const pybind11::dict& given, const char* name) { return given[name].cast<int64_t>(); }
inline Element element(const pybind11::dict& given, const char* name) {
    return static_cast<Element>(number(given, name));
}

// The fields that all problems have.
template <class Problem>
Problem common_fields(const pybind11::dict& given) {
    Problem problem = {};
    problem.rows = number(given, "rows");
    problem.height = number(given, "height");
    problem.width = number(given, "width");
    problem.tasks = number(given, "tasks");
    problem.element = element(given, "element");
    problem.input = {address<void>(given, "input"), number(given, "input_stride")};
    problem.grad_output = {address<void>(given, "grad_output"), number(given, "grad_output_stride")};
    problem.domains = {address<int64_t>(given, "offsets"), address<int64_t>(given, "order"), number(given, "domains")};
    problem.splits = number(given, "splits");
    problem.partials = address<float>(given, "partials");
    problem.values = address<double>(given, "values");
    problem.flag = address<int32_t>(given, "flag");
    return problem;
}

}  // namespace tikmix_fast::gpu
