--- The http part's shared dicts in the hands of the stream part of the same worker.
--
-- Why: nginx has two Lua modules with a Lua state and dicts each. A copy of the membership for the
-- stream part would have to be kept in step, and "acknowledged" would mean two places. But a dict
-- is memory that both parts of a worker see: the http part tells where its dicts are, by a variable
-- in the environment of this very process, and the stream part reads them through the C functions
-- that lua-resty-core calls for the http part. It does so only if the lua-resty-core that is
-- installed declares these functions as they are known here, and only after it has read, through
-- them, a value that the http part told it to expect.

local ffi = require "ffi"
local posix = require "tidegate.posix"

local concat = table.concat
local find = string.find
local format = string.format
local gmatch = string.gmatch
local gsub = string.gsub
local ipairs = ipairs
local match = string.match
local ngx = ngx
local pairs = pairs
local pcall = pcall
local setmetatable = setmetatable
local tonumber = tonumber
local type = type

local VARIABLE = "TIDEGATE_DICTS"
local SHARED = { "tidegate_ctl", "tidegate_ptr", "tidegate_dat", "tidegate_probes",
                 "tidegate_metrics", "tidegate_inflight" }
local DECLARATIONS = {
    "int ngx_http_lua_ffi_shdict_get(void *zone, const unsigned char *key, size_t key_len, "
        .. "int *value_type, unsigned char **str_value_buf, size_t *str_value_len, "
        .. "double *num_value, int *user_flags, int get_stale, int *is_stale, char **errmsg);",
    "int ngx_http_lua_ffi_shdict_incr(void *zone, const unsigned char *key, size_t key_len, "
        .. "double *value, char **err, int has_init, double init, long init_ttl, int *forcible);",
    "int ngx_http_lua_ffi_shdict_store(void *zone, int op, const unsigned char *key, "
        .. "size_t key_len, int value_type, const unsigned char *str_value_buf, "
        .. "size_t str_value_len, double num_value, long exptime, int user_flags, "
        .. "char **errmsg, int *forcible);",
}
-- What these functions take for an operation and give for a type.
local SAFE_ADD, SAFE_SET = 5, 4
local NUMBER, STRING = 3, 4

ffi.cdef [[
int setenv(const char *name, const char *value, int overwrite);
void free(void *pointer);
]]

local C = ffi.C
local cast = ffi.cast
local ffi_new = ffi.new
local ffi_string = ffi.string

local BUFFER_SIZE = 65536
local buffer
local value_type = ffi_new("int[1]")
local text = ffi_new("unsigned char *[1]")
local length = ffi_new("size_t[1]")
local number = ffi_new("double[1]")
local flags = ffi_new("int[1]")
local stale = ffi_new("int[1]")
local forcible = ffi_new("int[1]")
local reason = ffi_new("char *[1]")

local _M = {}
local dict = {}
dict.__index = dict


--- Tells the stream part of this worker where the dicts are.
-- @param instance a value of the control dict, by which it is seen that they are
function _M.publish(instance)
    local places = {}
    for index, name in ipairs(SHARED) do
        local zone = C.ngx_http_lua_ffi_shdict_udata_to_zone(ngx.shared[name][1])
        places[index] = format("%s=%x", name, tonumber(cast("uintptr_t", zone)))
    end
    C.setenv(VARIABLE, format("%d %s %s", ngx.worker.pid(), instance, concat(places, " ")), 1)
end


local function failed()
    return nil, reason[0] ~= nil and ffi_string(reason[0]) or "failed"
end


--- As `ngx.shared.DICT:get` for numbers and text; nil for anything else.
function dict:get(key)
    text[0], length[0], reason[0] = buffer, BUFFER_SIZE, nil
    local code = C.ngx_http_lua_ffi_shdict_get(self.zone, key, #key, value_type, text, length,
                                               number, flags, 0, stale, reason)
    local value
    if code == 0 and value_type[0] == NUMBER then
        value = number[0]
    elseif code == 0 and value_type[0] == STRING then
        value = ffi_string(text[0], length[0])
    end
    if text[0] ~= buffer then
        C.free(text[0])
    end
    if code ~= 0 then
        return failed()
    end
    return value
end


--- As `ngx.shared.DICT:incr` without a start value.
function dict:incr(key, delta)
    number[0], reason[0] = delta, nil
    if C.ngx_http_lua_ffi_shdict_incr(self.zone, key, #key, number, reason, 0, 0, 0,
                                      forcible) ~= 0 then
        return failed()
    end
    return number[0]
end


local function store(self, operation, key, value, seconds)
    local is_text = type(value) == "string"
    reason[0] = nil
    local code = C.ngx_http_lua_ffi_shdict_store(
        self.zone, operation, key, #key, is_text and STRING or NUMBER,
        is_text and value or nil, is_text and #value or 0, is_text and 0 or value,
        (seconds or 0) * 1000, 0, reason, forcible)
    if code ~= 0 then
        return failed()
    end
    return true
end


--- As `ngx.shared.DICT:safe_add` for numbers and text.
function dict:safe_add(key, value)
    return store(self, SAFE_ADD, key, value)
end


--- As `ngx.shared.DICT:safe_set` for numbers and text.
function dict:safe_set(key, value, seconds)
    return store(self, SAFE_SET, key, value, seconds)
end


-- Declares the functions, if the library that is installed does so in the same way.
local function declare()
    local path = package.searchpath("resty.core.shdict", package.path)
    local source = path and posix.read(path)
    if not source then
        return nil, "lua-resty-core is not found"
    end
    source = gsub(source, "%s+", " ")
    for _, declaration in ipairs(DECLARATIONS) do
        local name = match(declaration, "([%w_]+)%(")
        if not find(source, declaration, 1, true) then
            return nil, path .. " declares " .. name .. " in a way that is not known here"
        end
        ffi.cdef(declaration)
        if not pcall(function() return C[name] end) then
            return nil, "this binary has no " .. name
        end
    end
    return true
end


--- Puts the dicts of the http part into `ngx.shared` of the stream part.
-- @return true; or nil and why that cannot be
function _M.attach()
    local told = os.getenv(VARIABLE)
    local pid, instance, places = match(told or "", "^(%d+) (%x+) (.*)$")
    if tonumber(pid) ~= ngx.worker.pid() then
        return nil, "the http part of this worker has not told where its dicts are"
    end
    local ok, err = declare()
    if not ok then
        return nil, err
    end
    buffer = ffi_new("unsigned char[?]", BUFFER_SIZE)
    local found = {}
    for name, address in gmatch(places, "([%w_]+)=(%x+)") do
        local zone = cast("void *", cast("uintptr_t", tonumber(address, 16)))
        found[name] = setmetatable({ zone = zone }, dict)
    end
    if found.tidegate_ctl:get("instance") ~= instance then
        return nil, "the dicts of the http part do not hold what they should"
    end
    for name, item in pairs(found) do
        ngx.shared[name] = item
    end
    return true
end


return _M
