--- Answers of the admin API, as docs/admin-api.md has them.
--
-- Why: every call refuses in one form. What refuses returns nil, so that its caller gets nil from
-- the call that failed and has nothing left to do. Must not know what is asked.

local json = require "tidegate.json"

local ngx = ngx
local pairs = pairs
local tostring = tostring
local type = type

local BUSY_PAUSE = 1    -- seconds after which a call that met another one is to be tried again

local _M = {}


--- Answers with a value, or with text that is JSON already.
function _M.send(status, value)
    local text = type(value) == "string" and value or json.encode(value)
    ngx.status = status
    ngx.header["Content-Type"] = "application/json"
    ngx.header["Content-Length"] = #text + 1
    ngx.print(text, "\n")
    return nil
end


--- Answers that a call is refused.
-- @param code for programs, what went wrong
-- @param message the same for people
-- @param more further members of the answer
function _M.refuse(status, code, message, more)
    local value = { error = code, message = message }
    for key, item in pairs(more or {}) do
        value[key] = item
    end
    return _M.send(status, value)
end


--- Answers that another change is under way.
function _M.busy()
    ngx.header["Retry-After"] = BUSY_PAUSE
    return _M.refuse(503, "busy", "another change is being applied; try again")
end


--- Answers that a body has faults.
-- @param errors list of `{upstream, field, message}`
function _M.invalid(errors)
    local list = json.array(errors)
    local first = list[1]
    local message = #list == 1 and "1 fault" or #list .. " faults"
    if first then
        message = message .. "; the first: "
            .. (first.upstream and "upstream " .. tostring(first.upstream) .. ": " or "")
            .. first.field .. " " .. first.message
    end
    return _M.refuse(422, "invalid", message, { errors = list })
end


return _M
