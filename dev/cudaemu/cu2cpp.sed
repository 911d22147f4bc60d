# From CUDA C++ to C++: three changes that a header cannot make. Line numbers stay.
#
#     sed -f cu2cpp.sed program.cu > program.cpp
#
# Only a subset of CUDA is understood. A launch must be on one line up to its "(" and must name its
# template arguments. A __shared__ declaration must be on one line, inside a function, and its type
# must have no commas. Anything else does not compile.

# kernel<T><<<grid, block, shared, stream>>>(
# ->   kernel<T> << cudaemu::launch(NAME, grid, block, shared, stream)(
/<<</s/NULL/nullptr/g
s/\([A-Za-z0-9_:]*\(<[^<>;]*>\)*\) *<<<\(.*\)>>> *(/\1 << cudaemu::launch(CUDAEMU_NAME(\1), \3)(/

# First remove blanks behind variables of a __shared__ declaration; this keeps the rules short.
/__shared__/s/  *\([[,;]\)/\1/g

# extern __shared__ T x[];
s/extern  *__shared__  *\([^[,;]*[ *]\)\([^[,; ]*\)\[ *\];/CUDAEMU_DYNAMIC_SHARED(\1, \2);/

# __shared__ T x[n][m], y;   first all variables but the last, one by one, then the last
:next
s/__shared__  *\([^[,;]*[ *]\)\([^[,; ]*\)\([^,;]*\), */CUDAEMU_SHARED(\1, \2, \3); __shared__ \1/
t next
s/__shared__  *\([^[,;]*[ *]\)\([^[,; ]*\)\([^,;]*\);/CUDAEMU_SHARED(\1, \2, \3);/
