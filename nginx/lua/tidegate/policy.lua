--- The policy of an upstream: which fields it may have, what they may be, what they are by default.
--
-- Why: a policy comes over the wire, lies in the shared dict as JSON text and is read by whoever
-- acts on a field of it. So the fields stand in one place. What they mean says `agent/model.py`;
-- a field that this version does not know is kept and reported, so that an agent which is newer
-- than the proxy still finds what it pushed.

local json = require "tidegate.json"

local find = string.find
local floor = math.floor
local ipairs = ipairs
local pairs = pairs
local setmetatable = setmetatable
local sort = table.sort
local type = type

local MAX_SECONDS = 86400
local MAX_COUNT = 1000000
local NAME = "^[A-Za-z0-9_-]+$"
local COOKIE = "^[A-Za-z0-9._-]+$"
local STATUS = "^[0-9,-]+$"
local WORD = "^[a-z0-9_]+$"

local _M = {}


local function number(low, high, default)
    return {
        default = default,
        expected = "a number from " .. low .. " to " .. high,
        check = function(value)
            return type(value) == "number" and value >= low and value <= high
        end,
    }
end


local function whole(low, high, default)
    return {
        default = default,
        expected = "a whole number from " .. low .. " to " .. high,
        check = function(value)
            return type(value) == "number" and value >= low and value <= high
                and floor(value) == value
        end,
    }
end


local function text(pattern, default, limit)
    limit = limit or 128
    return {
        default = default,
        expected = "text of at most " .. limit .. " characters like " .. pattern,
        check = function(value)
            return type(value) == "string" and #value <= limit
                and (value == "" and default == "" or find(value, pattern) ~= nil)
        end,
    }
end


local function one_of(values, default)
    local known = {}
    for _, value in ipairs(values) do
        known[value] = true
    end
    return {
        default = default,
        expected = "one of " .. table.concat(values, ", "),
        check = function(value)
            return known[value] == true
        end,
    }
end


local function flag(default)
    return {
        default = default,
        expected = "true or false",
        check = function(value)
            return type(value) == "boolean"
        end,
    }
end


local function words(pattern)
    return {
        default = {},
        list = true,
        expected = "a list of at most 20 words",
        check = function(value)
            if type(value) ~= "table" or #value > 20 then
                return false
            end
            local count = 0
            for _, item in pairs(value) do
                count = count + 1
                if type(item) ~= "string" or #item > 64 or not find(item, pattern) then
                    return false
                end
            end
            return count == #value
        end,
    }
end


-- `default` is what the fields are where the object is absent; false for nothing at all.
local function object(fields, default)
    return { fields = fields, default = default, expected = "an object" }
end


local POLICY = object({
    algorithm = text(WORD, nil, 64),
    hash_key = text("^[a-z]+:?[A-Za-z0-9._-]*$", "", 160),
    hash_balance = number(0, 100, 0),
    sticky = object({
        kind = one_of({ "cookie", "app_cookie", "ip" }),
        cookie = text(COOKIE, ""),
        max_age = whole(0, 400 * 86400, 0),
        secure = flag(false),
        http_only = flag(true),
        same_site = text("^[A-Za-z]*$", "Lax"),
        path = text("^/[^%c; ]*$", "/", 255),
    }, false),
    slow_start = number(0, MAX_SECONDS, 0),
    max_conns = whole(0, MAX_COUNT, 0),
    queue = whole(0, MAX_COUNT, 0),
    queue_timeout = number(0, 300, 0),
    canary = object({
        upstream = text("^[^%c]+$", nil, 512),
        weight = whole(0, 100, 0),
        header = text(NAME, ""),
        header_value = text("^[ -~]+$", ""),
        cookie = text(COOKIE, ""),
    }, false),
    check = object({
        kind = one_of({ "tcp", "http" }),
        method = text("^[A-Z]+$", "GET", 16),
        path = text("^/[!-~]*$", "/", 1024),
        host = text("^[A-Za-z0-9_.:%[%]-]+$", "", 300),
        interval = number(0.1, MAX_SECONDS, 5),
        timeout = number(0.01, 300, 2),
        rise = whole(1, 100, 2),
        fall = whole(1, 100, 3),
        status = text(STATUS, "200-399"),
        tls = flag(false),
    }, false),
    passive = object({
        failures = whole(0, MAX_COUNT, 5),
        eject = number(0.1, MAX_SECONDS, 10),
        max_eject = number(0.1, MAX_SECONDS, 300),
    }, {}),
    panic = number(0, 1, 0.5),
    retry = object({
        tries = whole(0, 100, 0),
        on = words(WORD),
        timeout = number(0, MAX_SECONDS, 0),
        budget = number(0, 1, 0),
    }, {}),
    circuit = object({
        error_ratio = number(0.001, 1),
        min_requests = whole(1, MAX_COUNT, 20),
        window = number(1, 3600, 10),
        open = number(0.1, MAX_SECONDS, 5),
    }, false),
    timeouts = object({
        connect = number(0, MAX_SECONDS, 0),
        send = number(0, MAX_SECONDS, 0),
        read = number(0, MAX_SECONDS, 0),
    }, {}),
})


local function sorted_keys(value)
    local keys = {}
    for key in pairs(value) do
        if type(key) ~= "string" then
            return nil
        end
        keys[#keys + 1] = key
    end
    sort(keys)
    return keys
end


local function read_object(schema, value, path, wrong, unsupported)
    local keys = type(value) == "table" and sorted_keys(value)
    if not keys then
        wrong(path, value, schema.expected)
        return
    end
    for _, key in ipairs(keys) do
        local field, at = schema.fields[key], path .. "." .. key
        if not field then
            unsupported[at] = true
        elseif field.fields then
            read_object(field, value[key], at, wrong, unsupported)
        elseif not field.check(value[key]) then
            wrong(at, value[key], field.expected)
        elseif field.list then
            json.array(value[key])
        end
    end
    for key, field in pairs(schema.fields) do
        if field.default == nil and value[key] == nil then
            wrong(path .. "." .. key, nil, field.expected)
        end
    end
end


--- Checks the policy of an upstream as it came over the wire.
-- @param wrong called with path, value and what was expected, for each fault
-- @param unsupported set of fields that are not known here, added to
-- @return its JSON text, always the same for the same policy
function _M.read(value, wrong, unsupported)
    if value == nil then
        return '{"algorithm":"round_robin"}'
    end
    read_object(POLICY, value, "policy", wrong, unsupported)
    return type(value) == "table" and json.encode(value) or ""
end


local function complete(schema, value)
    local result = {}
    for key, field in pairs(schema.fields) do
        local given = value[key]
        if field.fields then
            given = given or field.default
            result[key] = given and complete(field, given)
        elseif given == nil then
            result[key] = field.default
        else
            result[key] = given
        end
    end
    return result
end


local cache = setmetatable({}, { __mode = "v" })


--- The policy of JSON `text`, with the defaults for all that it does not say; `sticky`, `canary`,
-- `check` and `circuit` are false where it has none. Shared: do not change it.
function _M.parse(text_)
    local policy = cache[text_]
    if not policy then
        policy = complete(POLICY, json.decode(text_) or {})
        policy.algorithm = policy.algorithm or "round_robin"
        cache[text_] = policy
    end
    return policy
end


--- Whether `policy` asks for the requests in flight to be counted, over all workers.
function _M.counts_load(policy)
    local algorithm = policy.algorithm
    return algorithm == "least_conn" or algorithm == "ewma" or policy.max_conns > 0
        or algorithm == "hash" and policy.hash_balance > 0
end


return _M
